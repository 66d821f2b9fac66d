"""Improves a rounded weight, group after group: a new step for its codes, then new codes one by one.

With E the error of the weight, every change lowers tr(E H E^T), H damped, while all else stays: the step by least
squares over its group, each code by going to the best one. GPTQ rounds an input knowing only those before it; here the
codes of all others are known. Sources of the descent over codes: Behdin et al. 2023, "QuantEase" (arXiv 2309.01885);
Nair and Suggala 2024, "CDQuant" (arXiv 2406.17542). As in GPTQ, inputs are taken in blocks, so that most of the work is
matrix products: a sweep costs about as much as one feedback.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.grid import Grid

BLOCK = 128  # inputs whose changes reach the inputs beyond the block in one matrix product


def refine(
    w: Tensor,
    H: Tensor,  # noqa: N803
    grid: Grid,
    q: Tensor,
    scale: Tensor,
    zero: Tensor,
    sweeps: int,
) -> tuple[Tensor, Tensor]:
    """Lower the error of every row, tr(E H E^T) with E = (q - zero) * scale - w; no row's error rises.

    Args:
        w: The weight that was rounded, (out, in), float32 or float64.
        H: Damped Gram matrix of its input, (in, in).
        grid: The integer grids.
        q: Codes, (out, in), uint8.
        scale: Steps, (out, in/group), in the type of `w`.
        zero: Zeros, likewise; they stay.
        sweeps: How often all groups are gone through.

    Returns:
        Codes and steps like those given.
    """
    target = w.T
    codes, steps, Z = q.T.to(w.dtype), scale.T.contiguous(), zero.T.contiguous()  # (in, out), (in/group, out)  # noqa: N806
    best_codes, best_steps, least = codes, steps, torch.full_like(w[:, 0], float("inf"))
    for sweep in range(sweeps + 1):
        error = _values(codes, steps, Z).sub_(target)
        slope = H @ error  # half the derivative of the energy
        energy = torch.linalg.vecdot(slope, error, dim=0)
        lower = energy < least  # but for rounding of sums it always is
        best_codes, best_steps = torch.where(lower, codes, best_codes), torch.where(lower, steps, best_steps)
        least = torch.where(lower, energy, least)
        if sweep < sweeps:
            codes, steps = codes.clone(), steps.clone()
            _sweep(H, grid, codes, steps, Z, slope)
    return best_codes.T.to(torch.uint8).contiguous(), best_steps.T.contiguous()


def _values(codes: Tensor, steps: Tensor, Z: Tensor) -> Tensor:  # noqa: N803
    """(q - zero) * scale, (in, out)."""
    groups = codes.unflatten(0, (len(steps), -1))
    return ((groups - Z.unsqueeze(1)) * steps.unsqueeze(1)).flatten(0, 1)


def _sweep(H: Tensor, grid: Grid, codes: Tensor, steps: Tensor, Z: Tensor, slope: Tensor) -> None:  # noqa: N803
    """Go through all groups once, in place; `slope` (in, out) is that of the codes and steps given."""
    width = len(codes)
    size = width // len(steps)
    steepness = H.diagonal().clamp(min=torch.finfo(H.dtype).tiny).tolist()
    if size > BLOCK:  # groups reach over blocks
        for group in range(len(steps)):
            at = slice(group * size, (group + 1) * size)
            moves = _fit_step(H[at, at], grid, codes[at] - Z[group], steps[group], slope[at])
            slope.addmm_(H[:, at], moves)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        moves = torch.zeros_like(slope[start:end])
        for j in range(start, end):
            group = j // size
            if j % size == 0 and size <= BLOCK:
                at = slice(j, j + size)
                moves[j - start : j - start + size] = _fit_step(
                    H[at, at], grid, codes[at] - Z[group], steps[group], slope[at]
                )
                slope[j:end].addmm_(H[j:end, at], moves[j - start : j - start + size])
            move = (slope[j] / steps[group]).div_(-steepness[j]).add_(codes[j]).round_().clamp_(0, grid.levels)
            move.sub_(codes[j])
            codes[j] += move
            move.mul_(steps[group])
            moves[j - start] += move
            if j + 1 < end:
                slope[j + 1 : end].addr_(H[j, j + 1 : end], move)
        if end < width:
            slope[end:].addmm_(H[end:, start:end], moves)


def _fit_step(H: Tensor, grid: Grid, offsets: Tensor, step: Tensor, slope: Tensor) -> Tensor:  # noqa: N803
    """Change the steps of one group to the best ones that can be stored, in place.

    Args:
        H: The group's part of it, (group, group).
        grid: The integer grids.
        offsets: Codes less zeros, (group, out).
        step: (out,).
        slope: (group, out).

    Returns:
        How the weights move, (group, out).
    """
    curvature = torch.linalg.vecdot(H @ offsets, offsets, dim=0)
    pull = torch.linalg.vecdot(slope, offsets, dim=0)
    change = grid.storable(step - pull / curvature) - step
    lower = change * (change * curvature + 2 * pull) < 0  # False where all offsets are zero, and for NaN
    change = torch.where(lower, change, 0.0)
    step += change
    return offsets * change
