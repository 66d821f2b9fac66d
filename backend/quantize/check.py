"""Everything about a model that can be refused before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from backend.errors import CheckpointError, ModelError
from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.skeleton import match_tensors, read_config, state_of
from backend.quantize.architecture import Architecture, describe
from backend.quantize.recipe import GROUP_SIZES, Recipe, Scheme

STORED_TYPES = ("F64", "F32", "F16", "BF16")


def check_model(model_dir: Path | str, recipes: Sequence[Recipe]) -> None:
    """Check a 16-bit model folder against what quantization needs.

    Reads config.json and the safetensors headers, no weights: architecture, completeness of the files, shapes, and
    that every recipe finds something to quantize.

    Raises:
        ModelError: If the architecture is not supported, a recipe fits no Linear, or the model is quantized already.
        CheckpointError: If weight files are missing, broken, or do not fit config.json.
    """
    architecture = checked_architecture(Path(model_dir), torch.bfloat16)
    for recipe in recipes:
        check_recipe(architecture, recipe)


def checked_architecture(model_dir: Path, dtype: torch.dtype) -> Architecture:
    """The module tree of a supported model whose files are complete, its parameters typed `dtype` on the meta device.

    Raises:
        ModelError: If the architecture is not supported, or the model is quantized already.
        CheckpointError: If weight files are missing, broken, or do not fit config.json.
    """
    if read_config_json(model_dir).get("quantization_config"):
        raise ModelError(f"{model_dir} is quantized already; give the 16-bit model it was made from.")
    architecture = describe(read_config(model_dir), dtype)
    return replace(architecture, stored=check_tensors(model_dir, architecture))


def check_tensors(model_dir: Path, architecture: Architecture) -> dict[str, str]:
    """Compare the headers with the module tree: every tensor once, with its shape, and no others.

    Tensors that the model computes itself, as old checkpoints hold them, are passed over.

    Returns:
        Name in the module tree -> name in the files, where the two differ.
    """
    headers = {info.name: info for info in read_headers(model_dir)}
    found = match_tensors(architecture.model, headers)
    if found.missing:
        raise CheckpointError(
            f"{model_dir}: tensor {found.missing[0]} of {architecture.name} is in none of its files; "
            "complete the checkpoint."
        )
    for name, expected in state_of(architecture.model).items():
        if name not in found.stored:
            continue  # tied to one that is there
        info = headers[found.stored[name]]
        if info.shape != tuple(expected.shape):
            raise CheckpointError(
                f"{model_dir}/{info.file}: {info.name} has shape {info.shape}; "
                f"config.json says {tuple(expected.shape)}."
            )
        if info.dtype not in STORED_TYPES:
            raise ModelError(f"{info.name} has dtype {info.dtype}; give the model in 16 or 32 bits.")
    if found.unexpected:
        raise CheckpointError(f"{model_dir} holds {found.unexpected[0]}, which {architecture.name} does not have.")
    return {name: stored for name, stored in found.stored.items() if name != stored}


def check_recipe(architecture: Architecture, recipe: Recipe) -> None:
    """Refuse a recipe that would leave every Linear of the decoder layers in 16 bits."""
    reasons: dict[str, str] = {}  # reason -> the first Linear that it holds for
    widths: set[int] = set()
    for index in range(len(architecture.layers)):
        for name, linear in architecture.linears(index).items():
            full = f"{architecture.layers_path}.{index}.{name}"
            plan = recipe.scheme_for(full, linear.in_features)
            if isinstance(plan, Scheme):
                return
            reasons.setdefault(plan, full)
            widths.add(linear.in_features)
    fitting = [size for size in GROUP_SIZES if any(width % size == 0 for width in widths)]
    told = "; ".join(f"{name}: {reason}" for reason, name in list(reasons.items())[:3])
    raise ModelError(
        f"The recipe {recipe.name!r} would quantize no Linear of {architecture.name} ({told}). "
        f"Group sizes that fit some of its inputs: {', '.join(map(str, (*fitting, 'one per channel')))}."
    )
