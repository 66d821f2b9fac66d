"""Checkpoints that compressed-tensors' own code has to run: 8-bit activations, FP8, FP4, quantized KV caches."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from backend.errors import CheckpointError, ModelError
from backend.formats.remote_code import remote_code_allowed


def load_with_transformers(
    folder: Path, quantization: Mapping[str, Any], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """Load a compressed-tensors folder through transformers, from its safetensors files alone.

    The caller has checked config.json and the files' headers. The package decompresses the weights when the model
    runs for the first time, so memory is that of a 16-bit model.

    Args:
        folder: The checkpoint.
        quantization: Its `quantization_config`.
        device: Where to put the model.
        dtype: Type to compute in; FP4 formats are always computed in bfloat16, the package has no other way.

    Raises:
        ModelError: If the package is not installed or does not know the format.
        CheckpointError: If tensors are missing or left over, which would make a model that runs, but wrongly.
    """
    if find_spec("compressed_tensors") is None:
        raise ModelError(
            f"{folder} is in a format that only the package compressed-tensors can run, and it is not installed here; "
            "install it, or quantize to a pack-quantized or AutoAWQ checkpoint."
        )
    if "fp4-pack-quantized" in json.dumps(quantization):
        dtype = torch.bfloat16
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=remote_code_allowed(),
            use_safetensors=True,
            output_loading_info=True,
        )
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OSError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = " ".join(lines[:3]) or type(error).__name__
        raise ModelError(f"compressed-tensors cannot load {folder}: {reason}") from error
    model, info = loaded
    for key, what in (("missing_keys", "lacks"), ("unexpected_keys", "holds, beyond the model's,")):
        names = sorted(info.get(key) or ())
        if names:
            raise CheckpointError(
                f"{folder} {what} {len(names)} tensors, first {names[0]}; as transformers loads it, it would run "
                "with wrong weights. Make the checkpoint again with a recipe that can be reloaded."
            )
    moved: PreTrainedModel = model.eval().to(device)
    return moved
