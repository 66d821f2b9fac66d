"""Which Linears of a model get codebooks, and why the others do not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from backend.errors import ModelError
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.architecture import Architecture
from backend.quantize.check import checked_architecture

KEEP = ("lm_head",)

Refusal = Callable[[AdditiveScheme, tuple[int, int]], str | None]
"""Why a Linear (out, in) cannot have a scheme, or None: `CheckpointWriter.refusal`."""


def check_model(model_dir: Path | str, scheme: AdditiveScheme, keep: Sequence[str] = KEEP) -> dict[str, str]:
    """Check a 16-bit model folder against what AQLM needs, without reading weights.

    Returns:
        Linears of the decoder layers that will stay in 16 bits, with the reason.

    Raises:
        ModelError: If the architecture is not supported, the scheme fits no Linear, or the model is quantized already.
        CheckpointError: If weight files are missing, broken, or do not fit config.json.
    """
    return kept_linears(checked_architecture(Path(model_dir), torch.bfloat16), scheme, keep)


def kept_linears(
    architecture: Architecture, scheme: AdditiveScheme, keep: Sequence[str] = KEEP, refusal: Refusal | None = None
) -> dict[str, str]:
    """Linears of the decoder layers that stay in 16 bits, with the reason.

    Args:
        architecture: The model.
        scheme: What the others get.
        keep: Linears whose name contains one of these are kept.
        refusal: What the checkpoint's format cannot hold.

    Raises:
        ModelError: If there would be nothing to quantize.
    """
    kept: dict[str, str] = {}
    count = 0
    for index in range(len(architecture.layers)):
        for name, linear in architecture.linears(index).items():
            full = f"{architecture.layers_path}.{index}.{name}"
            shape = (linear.out_features, linear.in_features)
            part = next((p for p in keep if p in full), None)
            reason = scheme.misfit(*shape) or (refusal(scheme, shape) if refusal else None)
            if part is not None:
                reason = f"its name contains {part!r}, which is to be kept"
            if reason is not None:
                kept[full] = reason
            count += 1
    if len(kept) == count:
        first = {reason: name for name, reason in reversed(kept.items())}
        told = "; ".join(f"{name}: {reason}" for reason, name in list(reversed(first.items()))[:3])
        raise ModelError(f"{scheme.label} would quantize no Linear of {architecture.name} ({told}).")
    return kept
