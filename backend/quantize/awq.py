"""AWQ's two searches, on Gram matrices: scales of salient input channels, and clipped ranges.

Both minimise the energy of the output error, tr(dW H dW^T), which needs no forward passes. Source: Lin et al. 2023
(arXiv 2306.00978); the candidates for scales are those of AutoAWQ 0.2.9.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.formats.weight import QuantizedWeight
from backend.quantize.gram import error_energy
from backend.quantize.grid import Grid

SEARCH_ROWS = 256  # rows on which scales are compared
CHUNK_ROWS = 1024  # rows quantized at a time: bounds memory, and stays in cache
RANGE_LEVELS = 20  # ranges times 1, 0.975, ... 0.525
RANGE_STEP = 0.025


@dataclass(frozen=True)
class ScaleChoice:
    """Result of the scale search for one group of Linears.

    Attributes:
        scale: Per producer channel, (width,); None if no scale beats plain rounding.
        energy: tr(dW H dW^T) with it.
        rtn_energy: The same for plain rounding.
    """

    scale: Tensor | None
    energy: float
    rtn_energy: float


def search_scale(
    weights: Sequence[Tensor],
    H: Tensor,  # noqa: N803
    mean_abs: Tensor,
    grid: Grid,
    ratios: int,
    channels: Tensor | None,
    width: int,
) -> ScaleChoice:
    """Find s so that rounding s * W loses least.

    Candidates are s = x^r / (w^(1-r) + 1e-4) for r = 0, 1/n, ... (n-1)/n, with x the mean |input| and w the mean
    |weight| relative to its group's largest, normalised to sqrt(max * min) = 1. Plain rounding is a candidate too.
    They are compared on at most `SEARCH_ROWS` evenly spaced rows, the winner against plain rounding on all rows.

    Args:
        weights: Of the Linears that share the input, each (out, in), float32.
        H: Gram matrix of the input, (in, in).
        mean_abs: Mean |input|, (in,).
        grid: The integer grids.
        ratios: n. 0: no search.
        channels: Producer channel of each input column, (in,); None if the scale has nowhere to go.
        width: Number of producer channels.
    """
    rtn_energy = sum(_rounding_energy(w, H, grid, None) for w in weights)
    if channels is None or ratios == 0:
        return ScaleChoice(None, rtn_energy, rtn_energy)
    together = torch.cat(list(weights))
    x = _per_channel(mean_abs, channels, width)
    x = x.clamp(min=1e-4 * float(x.max()))  # an input that is always 0 says nothing about its weights
    relative = grid.grouped(together.abs())
    relative = relative / (relative.amax(-1, keepdim=True) + 1e-6)
    w_mean = _per_channel(relative.flatten(-2).mean(0), channels, width)
    rows = together[:: -(-together.shape[0] // SEARCH_ROWS)]
    best, best_energy = None, _rounding_energy(rows, H, grid, None)
    for step in range(ratios):
        ratio = step / ratios
        scale = (x**ratio / (w_mean ** (1 - ratio) + 1e-4)).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        energy = _rounding_energy(rows, H, grid, scale[channels])
        if energy < best_energy:
            best, best_energy = scale, energy
    if best is None:
        return ScaleChoice(None, rtn_energy, rtn_energy)
    energy = sum(_rounding_energy(w, H, grid, best[channels]) for w in weights)
    if not energy < rtn_energy:
        return ScaleChoice(None, rtn_energy, rtn_energy)
    return ScaleChoice(best, energy, rtn_energy)


def _per_channel(values: Tensor, channels: Tensor, width: int) -> Tensor:
    """Mean over the columns behind each producer channel: (in,) -> (width,)."""
    total = torch.zeros(width, dtype=values.dtype, device=values.device).index_add_(0, channels, values)
    return total / torch.bincount(channels, minlength=width)


def _rounding_energy(w: Tensor, H: Tensor, grid: Grid, scale: Tensor | None) -> float:  # noqa: N803
    total = 0.0
    for part in w.split(CHUNK_ROWS):
        rounded = grid.nearest(part) if scale is None else grid.nearest(part * scale) / scale
        total += float(error_energy(rounded - part, H).sum())
    return total


def quantize_weight(w: Tensor, H: Tensor, grid: Grid, *, clipping: bool) -> tuple[QuantizedWeight, Tensor]:  # noqa: N803
    """Round a weight, with smaller ranges where they lower the output error.

    Args:
        w: (out, in), float32.
        H: Gram matrix of its input, (in, in).
        grid: The integer grids.
        clipping: Search for ranges.

    Returns:
        The quantized weight, and the energy of each row's output error, (out,).
    """
    blocks = torch.stack(list(_diagonal_blocks(H, grid.group_size))) if clipping else None
    parts: list[QuantizedWeight] = []
    energies: list[Tensor] = []
    for part in w.split(CHUNK_ROWS):
        groups = grid.grouped(part)
        scale, zero = grid.fit(groups)
        energy = _energy(part, grid.round(groups, scale, zero), H)
        if blocks is not None:
            smaller = search_ranges(groups, scale, zero, blocks, grid)
            clipped = _energy(part, grid.round(groups, smaller, zero), H)
            better = clipped < energy
            scale, energy = torch.where(better[:, None, None], smaller, scale), torch.where(better, clipped, energy)
        parts.append(grid.encode(part, scale, zero))
        energies.append(energy)
    whole = QuantizedWeight(*(torch.cat([getattr(p, f) for p in parts]) for f in ("q", "scale", "zero")))
    return whole, torch.cat(energies)


def search_ranges(groups: Tensor, scale: Tensor, zero: Tensor, blocks: Tensor, grid: Grid) -> Tensor:
    """The steps per row and group whose range minimises the group's own part of the error, e H_gg e.

    The groups' errors add up through the rest of H, so the caller must compare whole rows. AutoAWQ clamps weights
    to +-limit and fits again; shrinking both ends of the range costs less and leaves 4 to 12 % less error.

    Args:
        groups: Weight, (out, in/group, group), float32.
        scale: Steps of the full ranges, (out, in/group, 1).
        zero: Their zeros, likewise; a range that shrinks around 0 keeps its zero.
        blocks: Diagonal blocks of H, (in/group, group, group).
        grid: The integer grids.

    Returns:
        Steps, (out, in/group, 1).
    """
    by_group = groups.transpose(0, 1).contiguous()  # (in/group, out, group)
    full, zero = scale.transpose(0, 1), zero.transpose(0, 1)
    best, least = full, torch.full_like(full.squeeze(-1), torch.inf)
    for level in range(RANGE_LEVELS):
        candidate = grid.shrink(full, 1 - RANGE_STEP * level)
        energy = error_energy(grid.round(by_group, candidate, zero).sub_(by_group), blocks)  # (in/group, out)
        better = energy < least
        best, least = torch.where(better.unsqueeze(-1), candidate, best), torch.where(better, energy, least)
    return best.transpose(0, 1)


def _energy(w: Tensor, rounded: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    return error_energy(rounded.flatten(-2) - w, H)


def _diagonal_blocks(H: Tensor, size: int) -> Iterator[Tensor]:  # noqa: N803
    return (H[at : at + size, at : at + size] for at in range(0, H.shape[0], size))
