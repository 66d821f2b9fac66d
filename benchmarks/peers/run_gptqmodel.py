"""GPTQModel with its defaults: GPTQ in its own layout, AWQ in AutoAWQ's."""

from __future__ import annotations

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # with fewer it stops on machines with one or two cores

from gptqmodel import GPTQModel, QuantizeConfig
from peer import Task, run


def quantize(task: Task) -> None:
    """Quantize and save."""
    layouts = {"GPTQ": "gptq", "AWQ": "gemm"}
    if task.method not in layouts:
        raise SystemExit(f"GPTQModel has no {task.method}")
    config = QuantizeConfig(
        bits=task.bits,
        group_size=task.group_size,
        sym=task.symmetric,
        method=task.method.lower(),
        format=layouts[task.method],
        device="cpu",
    )
    os.makedirs(task.out_dir, exist_ok=True)
    os.chdir(task.out_dir)  # it makes a folder of logs in the working directory
    model = GPTQModel.load(task.model_dir, config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in task.tokens]
    model.quantize(rows, batch_size=1)
    model.save(task.out_dir)


run(quantize, "gptqmodel", "torch", "transformers")
