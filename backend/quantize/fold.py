"""Moves a scale of a Linear's input channels into whatever produced them, without changing the layer's output.

(x / s) (s W)^T = x W^T, so the columns of W may be multiplied by s (to make salient channels survive rounding) if
the producer of x divides by s: a normalisation's weight, or the rows of v_proj (for o_proj) and up_proj (for
down_proj). Whether a producer really is one is not deduced from names alone: every fold is checked by running the
layer (`verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.quantize.groups import InputGroup, weight_of

LINEAR_PRODUCERS = {"o_proj": "v_proj", "down_proj": "up_proj"}
# float32 rounding through a layer stays below these; a wrong fold is off by the size of the scales themselves.
OUTPUT_TOLERANCE = 1e-4  # of the layer's contribution to the residual stream
RESIDUAL_TOLERANCE = 1e-6  # of the residual stream itself


@dataclass(frozen=True, eq=False)
class Fold:
    """A place for a scale.

    Attributes:
        consumers: Linears whose input columns are multiplied by the scale.
        producer: Norm or Linear inside the layer whose output is divided by it.
        channels: For each input column of the consumers, the producer's channel behind it, (in,). Query heads
            that share a key/value head share its channels, and so its scales.
        width: Channels of the producer.
    """

    consumers: tuple[str, ...]
    producer: str
    channels: Tensor
    width: int


def find_fold(layer: nn.Module, group: InputGroup) -> Fold | None:
    """Where the scale of a group's input can go, or None if nothing suitable produced it."""
    consumer = layer.get_submodule(group.linears[0])
    assert isinstance(consumer, nn.Linear)
    if group.norm is not None:
        width = consumer.in_features
        if weight_of(layer, group.norm).shape[0] != width:
            return None
        return Fold(group.linears, group.norm, torch.arange(width), width)
    parent, _, leaf = group.linears[0].rpartition(".")
    name = f"{parent}.{LINEAR_PRODUCERS.get(leaf, '')}".lstrip(".")
    producer = dict(layer.named_modules()).get(name)
    if len(group.linears) > 1 or leaf not in LINEAR_PRODUCERS or not isinstance(producer, nn.Linear):
        return None
    channels = _channels(consumer.in_features, producer.out_features, layer.get_submodule(parent))
    return None if channels is None else Fold(group.linears, name, channels, producer.out_features)


def _channels(columns: int, rows: int, attention: nn.Module) -> Tensor | None:
    """Column c of o_proj is dimension d of query head h; it comes from row (h // share) * head_dim + d of v_proj."""
    column = torch.arange(columns)
    if columns == rows:
        return column
    head_dim = getattr(attention, "head_dim", None)
    if columns % rows or not isinstance(head_dim, int) or rows % head_dim:
        return None
    return column // (columns // rows * head_dim) * head_dim + column % head_dim


def apply_fold(layer: nn.Module, fold: Fold, scale: Tensor, storage: torch.dtype) -> Tensor:
    """Divide the producer and multiply the consumers, in place.

    A norm's weight is rounded to the type in which it will be stored, and the consumers take the scale that this
    rounding really left, so that the stored layer is exact.

    Args:
        layer: Its weights are float32.
        fold: Where.
        scale: One positive number per channel of the producer, (width,).
        storage: Type of stored norms.

    Returns:
        The scale of the consumers' columns, (in,).
    """
    weight = weight_of(layer, fold.producer)
    if weight.dim() == 2:
        weight.div_(scale[:, None])
    else:
        rounded = (weight / scale).to(storage).to(scale.dtype)
        usable = (rounded != 0) & rounded.isfinite()
        scale = torch.where(usable, weight / rounded, 1.0)
        weight.copy_(torch.where(usable, rounded, weight))
    bias = getattr(layer.get_submodule(fold.producer), "bias", None)
    if bias is not None:
        bias.div_(scale)
    columns = scale[fold.channels.to(scale.device)]
    for name in fold.consumers:
        weight_of(layer, name).mul_(columns)
    return columns


def verify(
    folds: Sequence[Fold],
    run: Callable[[], Tensor],
    apply: Callable[[Fold], None],
    reset: Callable[[], None],
    hidden: Tensor,
) -> dict[Fold, str]:
    """Apply folds and keep those that leave the layer's output as it was.

    Args:
        folds: To apply; those that fail are undone.
        run: The layer's output on the probe, float32.
        apply: Applies one fold to the layer.
        reset: Takes back all of them.
        hidden: The probe's input, which the output's residual part repeats.

    Returns:
        The folds that failed, with how far off the output was.
    """
    reference = run()

    def failure() -> str | None:
        off = float((run() - reference).norm())
        allowed = OUTPUT_TOLERANCE * (reference - hidden).norm() + RESIDUAL_TOLERANCE * reference.norm()
        relative = off / max(float(reference.norm()), 1e-30)
        return None if off <= float(allowed) else f"the layer's output changed by {relative:.2g} of its norm"

    for fold in folds:
        apply(fold)
    if failure() is None:
        return {}
    reset()
    kept: list[Fold] = []
    failed: dict[Fold, str] = {}
    for fold in folds:
        apply(fold)
        reason = failure()
        if reason is None:
            kept.append(fold)
            continue
        failed[fold] = reason
        reset()
        for good in kept:
            apply(good)
    return failed
