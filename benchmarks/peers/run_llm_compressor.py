"""llm-compressor as its documentation uses it: one `oneshot` call, its defaults for everything not asked for."""

from __future__ import annotations

import datasets
import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers import Modifier
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from peer import Task, run
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(task: Task) -> None:
    """Quantize and save as compressed-tensors."""
    if not torch.accelerator.is_available():
        # Its AWQ pins memory, which needs a GPU.
        IntermediatesCache.pin_memory = lambda self, *a, **k: None  # type: ignore[method-assign]
    weights = QuantizationArgs(
        num_bits=task.bits, type="int", strategy="group", group_size=task.group_size, symmetric=task.symmetric
    )
    groups = {"all": QuantizationScheme(targets=["Linear"], weights=weights)}
    rounding = GPTQModifier if task.method.endswith("GPTQ") else QuantizationModifier
    recipe: list[Modifier] = [AWQModifier()] if task.method.startswith("AWQ") else []
    recipe.append(rounding(config_groups=groups, ignore=["lm_head"]))
    model = AutoModelForCausalLM.from_pretrained(task.model_dir, dtype="auto")
    rows = {"input_ids": task.tokens.tolist(), "attention_mask": torch.ones_like(task.tokens).tolist()}
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(task.model_dir),
        recipe=recipe,
        dataset=None if task.method == "RTN" else datasets.Dataset.from_dict(rows),
        num_calibration_samples=len(task.tokens),
        max_seq_length=task.tokens.shape[1],
    )
    model.save_pretrained(task.out_dir, save_compressed=True)


run(quantize, "llmcompressor", "torch", "transformers")
