"""AWQ's search for scales of salient input channels, on Gram matrices: it needs no forward passes.

Source: Lin et al. 2023 (arXiv 2306.00978); the candidates are those of AutoAWQ 0.2.9. Where GPTQ rounds afterwards,
salience and loss are GPTQ's own: an input whose error the later inputs can make up for is not salient, however
large it is. What is left of input j's error is its conditional variance, 1 / U_jj^2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.quantize.fold import Fold
from backend.quantize.gptq import Factor
from backend.quantize.gram import error_energy
from backend.quantize.grid import Grid
from backend.quantize.rounding import round_nearest, round_with_feedback
from backend.quantize.site import Site

SEARCH_ROWS = 256  # rows on which scales are compared


@dataclass(frozen=True)
class Target:
    """A Linear for whose sake scales are searched.

    Attributes:
        weight: (out, in), float32, unscaled.
        grid: Its integer grids.
        factor: GPTQ's factor if GPTQ will round it, else None.
    """

    weight: Tensor
    grid: Grid
    factor: Factor | None


def search_scale(site: Site, fold: Fold, targets: Sequence[Target], ratios: int, *, clip: bool) -> Tensor | None:
    """Find s so that rounding s * W loses least.

    Candidates are s = x^r / (w^(1-r) + 1e-4) for r = 0, 1/n, ... (n-1)/n, with x the salience of each input and w
    the mean |weight| relative to its group's largest, normalised to sqrt(max * min) = 1. They compete with no scale
    at all, on at most `SEARCH_ROWS` evenly spaced rows of all targets together. The losses that rank them are quick
    ones; the winner must then lower the error of the real rounding, ranges and feedback included, of those rows.

    Args:
        site: The input.
        fold: Where the scale will go: channels that share a producer share a scale.
        targets: Linears to be rounded.
        ratios: n.
        clip: Whether the rounding will search for ranges.

    Returns:
        Per channel of the producer, (width,); None if no scale beats none.
    """
    channels = fold.channels.to(site.H.device)
    together = sum(len(t.weight) for t in targets)
    step = -(-together // SEARCH_ROWS)
    sampled = [Target(t.weight[::step], t.grid, t.factor) for t in targets]
    x = _per_channel(_salience(site, targets[0]), channels, fold.width)
    x = x.clamp(min=1e-4 * float(x.max()))  # an input that is always 0 says nothing about its weights
    w = _per_channel(_relative_weight(sampled), channels, fold.width)
    best, least = None, sum(_loss(site, target, None) for target in sampled)
    for scale in _candidates(x, w, ratios):
        loss = sum(_loss(site, target, scale[channels]) for target in sampled)
        if loss < least:
            best, least = scale, loss
    if best is None or _error(site, sampled, best[channels], clip) >= _error(site, sampled, None, clip):
        return None
    return best


def _candidates(x: Tensor, w: Tensor, ratios: int) -> Iterator[Tensor]:
    for step in range(ratios):
        ratio = step / ratios
        scale = (x**ratio / (w ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        yield scale / (scale.max() * scale.min()).sqrt()


def _salience(site: Site, target: Target) -> Tensor:
    return site.mean_abs if target.factor is None else _variance(target.factor).sqrt()


def _variance(factor: Factor) -> Tensor:
    """What is left of each input's variance once the later ones have made up for it, (in,), in natural order."""
    left = factor.U.diagonal() ** -2
    return left if factor.order is None else torch.empty_like(left).index_copy_(0, factor.order, left)


def _relative_weight(targets: Sequence[Target]) -> Tensor:
    total = torch.zeros_like(targets[0].weight[0])
    for target in targets:
        groups = target.grid.grouped(target.weight.abs())
        total += (groups / (groups.amax(-1, keepdim=True) + 1e-6)).flatten(-2).sum(0)
    return total / sum(len(t.weight) for t in targets)


def _loss(site: Site, target: Target, columns: Tensor | None) -> float:
    """Energy of the output error that rounding the scaled weight will leave."""
    w, grid = target.weight, target.grid
    scaled = w if columns is None else w * columns
    if target.factor is None:
        e = grid.nearest(scaled).sub_(scaled)
        return float(error_energy(e if columns is None else e / columns, site.fast_H).sum())
    steps = grid.fit(grid.grouped(scaled))[0].square().sum(0)  # (in/group, 1); an error is uniform within a step
    variance = _variance(target.factor)
    if columns is not None:
        variance = variance / columns.square()
    return float((steps * grid.grouped(variance)).sum() / 12)


def _error(site: Site, targets: Sequence[Target], columns: Tensor | None, clip: bool) -> float:
    """Energy of the output error of the targets, really rounded."""
    total = 0.0
    for target in targets:
        w = target.weight if columns is None else target.weight * columns
        if target.factor is None:
            rounded = round_nearest(w, site, target.grid, clip=clip, columns=columns)
        else:
            rounded = round_with_feedback([w], target.factor, target.grid, clip=clip, columns=columns)[0]
        e = rounded.dequantize() - w
        H = site.fast_H if target.factor is None else site.H  # errors fed back are not independent  # noqa: N806
        total += float(error_energy(e if columns is None else e / columns, H).sum())
    return total


def _per_channel(values: Tensor, channels: Tensor, width: int) -> Tensor:
    """Mean over the columns behind each producer channel: (in,) -> (width,)."""
    total = torch.zeros(width, dtype=values.dtype, device=values.device).index_add_(0, channels, values)
    return total / torch.bincount(channels, minlength=width)
