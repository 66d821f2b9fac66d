"""Which words are nearest: distances as one matrix product, in pieces that stay in a CPU's cache.

A distance without what all words share is ||c||^2 - 2 c x, the product of the row [-2 c, ||c||^2] of a table and
[x, 1]. The smallest entries are found without `argmin`, which is many times slower than `amin` on CPUs: an entry's
index takes the place of the last bits of its mantissa, which moves it by less than 2^-15 of itself.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

INDEX_WORDS = 256  # words whose index goes into a mantissa: 8 of 23 bits
TILE = {"cpu": 2**17, "cuda": 2**27}  # distances that are computed at a time


def distance_table(words: Tensor) -> Tensor:
    """Tables of words, (..., M, G) -> (..., M, G + 1)."""
    return torch.cat([words * -2, words.square().sum(-1, keepdim=True)], -1)


def least_distance(table: Tensor, x: Tensor) -> Tensor:
    """The distance of each point to its nearest word.

    Args:
        table: Of M words, (M, G + 1).
        x: Points with a one at their end, (G + 1, N).

    Returns:
        (N,).
    """
    columns = tile_columns(len(table), table.device)
    if x.shape[1] <= columns:
        return (table @ x).amin(0)
    return torch.cat([(table @ part).amin(0) for part in x.split(columns, 1)])


def nearest(table: Tensor, x: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Near words: of each of `count` equal classes of words the nearest one.

    Args:
        table: Of M words, a power of two, (M, G + 1).
        x: Points with a one at their end, (G + 1, N).
        count: A power of two up to M.

    Returns:
        Distances and words, int32, both (count, N); the nearest word of all is among them.
    """
    columns = tile_columns(len(table), table.device)
    if x.shape[1] <= columns:
        return smallest(table @ x, count)
    parts = [smallest(table @ part, count) for part in x.split(columns, 1)]
    return torch.cat([values for values, _ in parts], 1), torch.cat([words for _, words in parts], 1)


def smallest(scores: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """The smallest entry of each column in each of `count` classes of rows, those of like index modulo `count`.

    Args:
        scores: (M, N), float32, finite; M a power of two. Overwritten.
        count: A power of two up to M.

    Returns:
        Entries and their rows, int32, both (count, N).
    """
    M, N = scores.shape  # noqa: N806
    bits = scores.view(torch.int32)
    if M <= INDEX_WORDS:
        bits.bitwise_and_(-M).bitwise_or_(_index(M, 1, scores.device))
        least = scores.view(M // count, count, N).amin(0)
        return least, least.view(torch.int32).bitwise_and(M - 1)
    width = min(INDEX_WORDS, M // count)  # so many rows of a class have an index in the mantissa
    rest = M // width
    bits.bitwise_and_(-width).bitwise_or_(_index(M, rest, scores.device))
    least = scores.view(width, rest, N).amin(0)
    rows = (least.view(torch.int32) & (width - 1)) * rest + _index(rest, 1, scores.device)
    least, turn = least.view(-1, count, N).min(0)
    return least, rows.view(-1, count, N).gather(0, turn.unsqueeze(0)).squeeze(0)


def ranked(errors: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` smallest entries of each column of (A, N), ascending, and their rows, int64."""
    if keep == 1:
        return errors.min(0, keepdim=True)
    return errors.topk(keep, dim=0, largest=False)


def tile_columns(words: int, device: torch.device) -> int:
    """Points whose distances to so many words are computed at a time."""
    return max(1, TILE.get(device.type, TILE["cuda"]) // words)


@lru_cache(maxsize=64)
def _index(count: int, step: int, device: torch.device) -> Tensor:
    """0, 1, 2, ..., each `step` times, as a column of `count` int32."""
    return torch.arange(count, dtype=torch.int32, device=device).div_(step, rounding_mode="floor").unsqueeze(1)
