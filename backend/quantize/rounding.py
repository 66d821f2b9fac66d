"""Rounds the weights of Linears that share an input, to the nearest code or with GPTQ's error feedback.

Ranges smaller than the weights' own are tried, and what lowers the error of a row's output is kept: per group where
rounding is to nearest, per row where errors are fed back (there the error of a group depends on all others).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from backend.formats.weight import QuantizedWeight
from backend.quantize.gptq import Factor, feed_back
from backend.quantize.gram import energy_change, error_energy
from backend.quantize.grid import Grid
from backend.quantize.refine import refine
from backend.quantize.site import Site

CHUNK = {"cpu": 2**18, "cuda": 2**24}  # weights rounded to nearest at a time: cache of a CPU, width of a GPU
MIN_ROWS = 256  # but no fewer rows than this: their product with H must not be bound by reading H
FEEDBACK_CHUNK = 2**25  # weights rounded with feedback at a time, every range tried counting: bounds memory
# Parts of the full range that are tried. Few codes pay for clipping their largest weights, many do not.
GROUP_RANGES = {2: (0.9, 0.8, 0.7, 0.6, 0.5, 0.4), 3: (0.92, 0.84, 0.76, 0.68, 0.6), 4: (0.95, 0.9, 0.85, 0.8, 0.75)}
ROW_RANGES = {2: (0.9, 0.8, 0.7), 3: (0.9, 0.8), 4: (0.9,)}


def round_nearest(w: Tensor, site: Site, grid: Grid, *, clip: bool, columns: Tensor | None) -> QuantizedWeight:
    """Round a weight to the nearest codes.

    Args:
        w: (out, in), float32.
        site: Its input.
        grid: The integer grids.
        clip: Search for ranges.
        columns: What the weight's columns were multiplied by, (in,); the site's H is that of the unscaled input.
    """
    ranges = GROUP_RANGES.get(grid.bits, ()) if clip else ()
    size = grid.grouped(w[:1]).shape[-1]
    blocks = site.blocks(size, columns) if ranges else None
    rows = max(MIN_ROWS, CHUNK.get(w.device.type, CHUNK["cuda"]) // w.shape[1])
    parts = [_round_rows(part, site, grid, ranges, blocks, columns) for part in w.split(rows)]
    q, scale, zero = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return grid.weight(q, scale, zero)


def _round_rows(
    w: Tensor, site: Site, grid: Grid, ranges: Sequence[float], blocks: Tensor | None, columns: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    groups = grid.grouped(w)
    full, zero = grid.fit(groups)
    scale = full
    if blocks is not None:
        scale = search_ranges(groups, full, zero, blocks, grid, ranges)
        # The groups' errors add up through the rest of H, so whole rows decide.
        before, after = (_unscaled(grid.round(groups, s, zero).flatten(-2).sub_(w), columns) for s in (full, scale))
        worth = energy_change(before, after, site.fast_H) < 0
        scale = torch.where(worth[:, None, None], scale, full)
    q = grid.codes(groups, scale, zero).flatten(-2).to(torch.uint8)
    return q, scale.squeeze(-1), zero.squeeze(-1)


def search_ranges(
    groups: Tensor, scale: Tensor, zero: Tensor, blocks: Tensor, grid: Grid, ranges: Sequence[float]
) -> Tensor:
    """The steps per row and group whose range minimises the group's own part of the error, e H_gg e.

    AutoAWQ clamps weights to +-limit and fits again; shrinking both ends of the range costs less and leaves 4 to
    12 % less error.

    Args:
        groups: Weight, (out, in/group, group), float32.
        scale: Steps of the full ranges, (out, in/group, 1).
        zero: Their zeros, likewise; a range that shrinks around 0 keeps its zero.
        blocks: Diagonal blocks of H, (in/group, group, group).
        grid: The integer grids.
        ranges: Parts of the full range to try beside it.

    Returns:
        Steps, (out, in/group, 1).
    """
    by_group = groups.transpose(0, 1).contiguous()  # (in/group, out, group)
    full, zero = scale.transpose(0, 1), zero.transpose(0, 1)
    best, least = full, error_energy(grid.round(by_group, full, zero).sub_(by_group), blocks)  # (in/group, out)
    for part in ranges:
        candidate = grid.storable(full * part)
        energy = error_energy(grid.round(by_group, candidate, zero).sub_(by_group), blocks)
        better = energy < least
        best, least = torch.where(better.unsqueeze(-1), candidate, best), torch.where(better, energy, least)
    return best.transpose(0, 1)


def round_with_feedback(
    weights: Sequence[Tensor],
    factor: Factor,
    grid: Grid,
    *,
    clip: bool,
    columns: Tensor | None,
    sweeps: int = 0,
    H: Tensor | None = None,  # noqa: N803
) -> list[QuantizedWeight]:
    """Round weights of one input with GPTQ.

    Args:
        weights: Each (out, in), float32.
        factor: Of their input's Gram matrix.
        grid: The integer grids.
        clip: Try smaller ranges too, and keep for each row the one whose output error is least.
        columns: As for `round_nearest`.
        sweeps: How often steps and codes are refined afterwards.
        H: The Gram matrix that is refined with, needed if `sweeps` is not 0.
    """
    damped = None
    if sweeps:
        assert H is not None
        damped = H.clone()
        damped.diagonal().add_(factor.damp * H.diagonal().mean())
        if columns is not None:
            damped.div_(columns).div_(columns[:, None])
    ranges = ROW_RANGES.get(grid.bits, ()) if clip else ()
    rows = max(1, FEEDBACK_CHUNK // weights[0].shape[1] // (1 + len(ranges)))
    parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in weights]
    for pack in _packs([len(w) for w in weights], rows):
        w = torch.cat([weights[number][begin:end] for number, begin, end in pack])
        q, scale, zero = _best_rows(w, factor, grid, ranges, columns)
        if damped is not None:
            q, scale = refine(w, damped, grid, q, scale, zero, sweeps)
        at = 0
        for number, begin, end in pack:
            rows_of = slice(at, at + end - begin)
            parts[number].append((q[rows_of], scale[rows_of], zero[rows_of]))
            at += end - begin
    return [grid.weight(*(torch.cat(tensors) for tensors in zip(*part, strict=True))) for part in parts]


def _packs(counts: list[int], limit: int) -> list[list[tuple[int, int, int]]]:
    """Rows of all weights, (weight, begin, end), in packs of at most `limit` rows."""
    packs: list[list[tuple[int, int, int]]] = [[]]
    free = limit
    for number, count in enumerate(counts):
        begin = 0
        while begin < count:
            if free == 0:
                packs.append([])
                free = limit
            end = min(count, begin + free)
            packs[-1].append((number, begin, end))
            free -= end - begin
            begin = end
    return packs


def _best_rows(
    w: Tensor, factor: Factor, grid: Grid, ranges: Sequence[float], columns: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, steps and zeros with the best range of each row; all ranges are tried at once, as rows of one weight."""
    full, zero = (tensor.squeeze(-1) for tensor in grid.fit(grid.grouped(w)))
    steps = torch.stack([full, *(grid.storable(full * part) for part in ranges)])  # (ranges, out, in/group)
    many = len(steps)
    q, energy = feed_back(w.repeat(many, 1), factor, grid, steps.flatten(0, 1), zero.repeat(many, 1), columns=columns)
    best = energy.view(many, -1).argmin(0)
    rows = torch.arange(len(w), device=w.device)
    return q.view(many, *w.shape)[best, rows], steps[best, rows], zero


def _unscaled(e: Tensor, columns: Tensor | None) -> Tensor:
    return e if columns is None else e / columns
