"""AutoAWQ with its defaults, GEMM layout."""

from __future__ import annotations

from awq import AutoAWQForCausalLM
from peer import Task, run
from transformers import AutoTokenizer


def quantize(task: Task) -> None:
    """Quantize and save. It knows one way only: AWQ, asymmetric."""
    if task.method != "AWQ" or task.symmetric:
        raise SystemExit(f"AutoAWQ has no {task.method} with symmetric={task.symmetric}")
    model = AutoAWQForCausalLM.from_pretrained(task.model_dir, device_map="cpu", safetensors=True)
    model.quantize(
        AutoTokenizer.from_pretrained(task.model_dir),
        quant_config={"w_bit": task.bits, "q_group_size": task.group_size, "zero_point": True, "version": "GEMM"},
        calib_data=task.tokens.tolist(),
        max_calib_samples=len(task.tokens),
        max_calib_seq_len=task.tokens.shape[1],
    )
    model.save_quantized(task.out_dir)


run(quantize, "autoawq", "torch", "transformers")
