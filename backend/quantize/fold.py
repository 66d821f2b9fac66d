"""Moves a scale of a Linear's input channels into whatever produced them, without changing the layer's output.

(x / s) (s W)^T = x W^T, so the columns of W may be multiplied by s (to make salient channels survive rounding) if
the producer of x divides by s: a normalisation's gain, or rows of an earlier Linear (`backend.quantize.producers`
finds which). Whether a place really is one is not deduced from names: every fold is checked by running the layer
(`verify`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.quantize.groups import InputGroup, weight_of

# float32 rounding through a layer stays below these; a wrong fold is off by the size of the scales themselves.
OUTPUT_TOLERANCE = 1e-4  # of the layer's contribution to the residual stream
RESIDUAL_TOLERANCE = 1e-6  # of the residual stream itself
GAIN_TOLERANCE = 1e-4
PROBE_ROWS = 4


@dataclass(frozen=True, eq=False)
class Fold:
    """A place for a scale.

    Attributes:
        consumers: Linears whose input columns are multiplied by the scale.
        producer: Norm or Linear inside the layer whose output is divided by it.
        channels: For each input column of the consumers, the producer's channel behind it, (in,). Query heads
            that share a key/value head share its channels, and so its scales.
        width: Channels of the producer: the scales there are.
        rows: Of a Linear, the output rows that are divided, one per channel, (width,); None for a norm.
        offset: Of a norm, what it adds to its weight to get its gain: 1 for Gemma's, else 0.
    """

    consumers: tuple[str, ...]
    producer: str
    channels: Tensor
    width: int
    rows: Tensor | None = None
    offset: float = 0.0

    def row_scale(self, scale: Tensor, rows: int) -> Tensor:
        """What each of a Linear producer's rows is divided by, 1 where it is left alone, (rows,)."""
        assert self.rows is not None, "the producer is a norm"
        divided = torch.ones(rows, dtype=scale.dtype, device=scale.device)
        divided[self.rows.to(scale.device)] = scale
        return divided


def find_fold(layer: nn.Module, group: InputGroup) -> Fold | None:
    """Where the scale of a group's input can go if a normalisation made it.

    None if none did, or one without a gain per channel.
    """
    if group.norm is None:
        return None
    consumer = layer.get_submodule(group.linears[0])
    assert isinstance(consumer, nn.Linear)
    offset = gain_offset(layer.get_submodule(group.norm), consumer.in_features)
    if offset is None:
        return None
    width = consumer.in_features
    return Fold(group.linears, group.norm, torch.arange(width), width, offset=offset)


@torch.no_grad()
def gain_offset(norm: nn.Module, width: int) -> float | None:
    """What a normalisation adds to its weight to get its gain per channel, a whole number.

    Seen by running it with weights 0, 1 and random ones. None if its gain is not offset + weight.

    Args:
        norm: Module with a `weight` (width,) and perhaps a `bias`.
        width: Channels.
    """
    weight = norm.weight
    if not isinstance(weight, Tensor) or weight.shape != (width,):
        return None
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, width, generator=generator).to(weight.device) for n in (PROBE_ROWS, 1))
    zeros = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in norm.named_parameters()}

    def run(values: Tensor) -> Tensor:
        output = torch.func.functional_call(norm, zeros | {"weight": values}, (x,))
        assert isinstance(output, Tensor)
        return output

    try:
        constant = run(torch.zeros_like(w[0]))
        unit = run(torch.ones_like(w[0])) - constant
        random = run(w[0])
    except (TypeError, RuntimeError, AssertionError):
        return None  # it wants more than its input
    offset = round(float((constant * unit).sum() / unit.square().sum().clamp(min=1e-30)))
    expected = (offset + w) * unit
    off = (random - expected).norm() + (constant - offset * unit).norm()
    return float(offset) if unit.norm() > 0 and off <= GAIN_TOLERANCE * expected.norm() else None


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
    bias = getattr(layer.get_submodule(fold.producer), "bias", None)
    if fold.rows is not None:
        rows = fold.rows.to(scale.device)
        weight[rows] = weight[rows] / scale[:, None]
        if bias is not None:
            bias[rows] = bias[rows] / scale
    else:
        gain = fold.offset + weight
        rounded = (gain / scale - fold.offset).to(storage).to(scale.dtype)
        left = fold.offset + rounded
        usable = (left != 0) & left.isfinite()
        scale = torch.where(usable, gain / left, 1.0)
        weight.copy_(torch.where(usable, rounded, weight))
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
