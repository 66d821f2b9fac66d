"""Everything about a model that can be refused before a weight is read."""

from __future__ import annotations

from pathlib import Path

import torch

from backend.errors import CheckpointError, ModelError
from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.size import PACK, is_quantized_linear
from backend.formats.skeleton import read_config
from backend.quantize.architecture import LAYERS, Architecture, describe
from backend.quantize.settings import AwqSettings


def check_model(model_dir: Path | str, settings: AwqSettings) -> None:
    """Check a 16-bit model folder against what quantization needs.

    Reads config.json and the safetensors headers, no weights: architecture, completeness of the files, shapes,
    widths that the group size must divide.

    Raises:
        ModelError: If the architecture or a width is not supported, or the model is quantized already.
        CheckpointError: If weight files are missing, broken, or do not fit config.json.
    """
    checked_architecture(Path(model_dir), settings, torch.bfloat16)


def checked_architecture(model_dir: Path, settings: AwqSettings, dtype: torch.dtype) -> Architecture:
    """The module tree of a model that passes `check_model`, its parameters typed `dtype` on the meta device."""
    if read_config_json(model_dir).get("quantization_config"):
        raise ModelError(f"{model_dir} is quantized already; give the 16-bit model it was made from.")
    architecture = describe(read_config(model_dir), dtype)
    check_tensors(model_dir, architecture)
    check_widths(architecture, settings)
    return architecture


def check_tensors(model_dir: Path, architecture: Architecture) -> None:
    """Compare the headers with the module tree: every parameter once, with its shape, and no others."""
    stored = {info.name: info for info in read_headers(model_dir)}
    tied = "lm_head.weight" if getattr(architecture.config, "tie_word_embeddings", False) else ""
    expected = {n: p.shape for n, p in architecture.model.named_parameters(remove_duplicate=False) if n != tied}
    for name, shape in expected.items():
        if name not in stored:
            raise CheckpointError(
                f"{model_dir}: tensor {name} of {architecture.name} is in none of its files; complete the checkpoint."
            )
        if stored[name].shape != tuple(shape):
            raise CheckpointError(
                f"{model_dir}/{stored[name].file}: {name} has shape {stored[name].shape}; "
                f"config.json says {tuple(shape)}."
            )
        if stored[name].dtype not in ("F64", "F32", "F16", "BF16"):
            raise ModelError(f"{name} has dtype {stored[name].dtype}; give the model in 16 or 32 bits.")
    extra = sorted(stored.keys() - expected.keys() - {tied})
    if extra:
        raise CheckpointError(f"{model_dir} holds {extra[0]}, which {architecture.name} does not have.")


def check_widths(architecture: Architecture, settings: AwqSettings) -> None:
    """Every Linear to quantize must divide into groups along its input and into words along its output."""
    for index in range(len(architecture.layers)):
        for name, linear in architecture.linears(index).items():
            full = f"{LAYERS}.{index}.{name}"
            if not is_quantized_linear(f"{full}.weight", tuple(linear.weight.shape), settings.modules_to_not_convert):
                continue
            if linear.in_features % settings.group_size:
                fitting = [g for g in (128, 64, 32) if linear.in_features % g == 0]
                advice = f"use {' or '.join(map(str, fitting))}" if fitting else "add it to modules_to_not_convert"
                raise ModelError(
                    f"{full} has {linear.in_features} inputs, which group size {settings.group_size} does not divide; "
                    f"{advice}."
                )
            if linear.out_features % PACK:
                raise ModelError(
                    f"{full} has {linear.out_features} outputs; the AutoAWQ layouts need a multiple of {PACK}."
                )
