"""New codes for the groups of a weight that have drifted most: the V step of PV-tuning."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TILE_FLOATS = 2**22  # candidates scored at a time


def nearest_codes(
    targets: Tensor, codes: Tensor, codebooks: Tensor, *, beam: int, first: int = 0, force: bool = False
) -> Tensor:
    """Codes whose codewords add up to something near the targets, never farther than the present ones.

    With one codebook the nearest word. With more, codewords are exchanged one codebook after another, and the `beam`
    best choices so far are kept.

    Args:
        targets: (n, G), float32.
        codes: The present ones, (n, K).
        codebooks: (K, M, G), float32.
        beam: Choices that are kept.
        first: Codebook to begin with.
        force: Leave out the present codes: the best others are returned, near or not.

    Returns:
        (n, K), in the type of `codes`.
    """
    books, words, _ = codebooks.shape
    rows = max(1, TILE_FLOATS // (words * (beam if books > 1 else 1)))
    order = [(first + i) % books for i in range(books)]
    parts = [
        _search(t, c.long(), codebooks, order, beam, force)
        for t, c in zip(targets.split(rows), codes.split(rows), strict=True)
    ]
    return torch.cat(parts).to(codes.dtype) if parts else codes


def _search(t: Tensor, codes: Tensor, codebooks: Tensor, order: list[int], beam: int, force: bool) -> Tensor:
    books, words, _ = codebooks.shape
    n = len(t)
    squares = codebooks.square().sum(-1)  # (K, M)
    chosen = codes[:, None]  # (n, b, K); b grows to `beam`
    residual = (t - codebooks[torch.arange(books, device=t.device), codes].sum(1))[:, None]  # (n, b, G)
    unchanged = torch.ones((n, 1), dtype=torch.bool, device=t.device)  # the choices that are the present codes so far
    for number, k in enumerate(order):
        target = residual + codebooks[k][chosen[:, :, k]]
        # |target - c|², (n, b, M); differences of large numbers, which only the order of near ties can feel
        scores = target.square().sum(-1, keepdim=True) + squares[k] - 2 * (target @ codebooks[k].T)
        last = number == len(order) - 1
        if force and last:
            scores.scatter_add_(2, chosen[:, :, k, None], torch.where(unchanged, math.inf, 0.0)[..., None])
        keep = 1 if last else min(beam, scores.shape[1] * words)
        best = scores.flatten(1).topk(keep, dim=1, largest=False).indices  # (n, keep)
        parent, word = best // words, best % words
        chosen = chosen.gather(1, parent[..., None].expand(-1, -1, books)).clone()
        unchanged = unchanged.gather(1, parent) & (chosen[:, :, k] == word)
        chosen[:, :, k] = word
        target = target.gather(1, parent[..., None].expand(-1, -1, t.shape[1]))
        residual = target - codebooks[k][word]
    return chosen[:, 0]


def largest(changes: Tensor, part: float) -> Tensor:
    """Indices of the groups with the largest changes, largest first.

    Args:
        changes: One number per group, not negative.
        part: Of all groups, rounded up.
    """
    count = min(changes.numel(), math.ceil(part * changes.numel()))
    return changes.flatten().topk(count).indices


def within_trust(squares: Tensor, limit: float) -> Tensor:
    """Which of the changes, taken in order, to make so that together they stay within a norm; always the first.

    Args:
        squares: Of each group's change, float64, in order. Groups that do not change have 0.
        limit: The norm.

    Returns:
        A mask.
    """
    fits = squares.cpu().cumsum(0).sqrt() <= limit
    moved = squares.cpu() > 0
    fits |= moved & (moved.cumsum(0) == 1)
    return fits.to(squares.device)
