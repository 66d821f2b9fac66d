"""First codebooks: residual k-means (Lloyd 1982) on a sample of the groups, in the metric of error feedback.

The point x of place j, in a row of scale s, is s^2 ||(x - c) T_j||^2 away from the word c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.encode import TILE, smallest
from backend.quantize.aqlm.metric import Metric

RIDGE = 1e-6


def residual_kmeans(
    V: Tensor,  # noqa: N803
    weights: Tensor,
    metric: Metric,
    books: tuple[int, int],
    points: int | None,
    iterations: int,
    generator: torch.Generator,
) -> Tensor:
    """Codebooks, each fitted to what the ones before it left.

    Args:
        V: Scaled weight in the metric's order, (out, in).
        weights: Squares of the rows' scales, (out,).
        metric: Of the inputs.
        books: K, codebooks, and M, words of each.
        points: Groups per word in the sample; None: all groups.
        iterations: Of each k-means, at most.
        generator: On the device of V.

    Returns:
        (K, M, G).
    """
    K, M = books  # noqa: N806
    x, weights = _sample(V, weights, metric.size, None if points is None else points * M, generator)
    S = metric.T @ metric.T.mT  # (in/G, G, G)  # noqa: N806
    found = []
    for _ in range(K):
        words, codes = _kmeans(x, weights, S, M, iterations, generator)
        x = x - words[codes.squeeze(2)]
        found.append(words)
    return torch.stack(found)


def _sample(
    V: Tensor, weights: Tensor, size: int, points: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Points (n, in / G, G) and their weights (n, in / G): n rows of each place, other ones in each."""
    out, groups = V.shape[0], V.shape[1] // size
    count = out if points is None else min(out, -(-points // groups))
    order = torch.randperm(out, generator=generator, device=V.device)
    at = torch.arange(count * groups, device=V.device).view(groups, count).T % out
    rows = order[at]
    return V.view(out, groups, size)[rows, torch.arange(groups, device=V.device)], weights[rows]


def _kmeans(
    x: Tensor,
    weights: Tensor,
    S: Tensor,  # noqa: N803
    M: int,  # noqa: N803
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Words (M, G) and codes (n, places, 1). Seeds are drawn by their part of the loss."""
    y = torch.einsum("njg,jgh->njh", x, S)
    share = (torch.linalg.vecdot(y, x) * weights).flatten().double().clamp_min(0)
    share += share.mean() * 1e-6 + 1e-30
    words = x.flatten(0, 1)[share.multinomial(M, generator=generator)]
    codes = _assign(y, S, words)
    for _ in range(iterations):
        words = _centroids(y, weights, S, words, codes)
        before, codes = codes, _assign(y, S, words)
        if torch.equal(before, codes):
            break
    return words, codes


def _assign(y: Tensor, S: Tensor, words: Tensor) -> Tensor:  # noqa: N803
    """The nearest word of each point, (n, places, 1), by c S c - 2 x S c."""
    n, places, _ = y.shape
    M = words.shape[0]  # noqa: N806
    squares = (words.unsqueeze(2) * words.unsqueeze(1)).flatten(1)  # (M, G * G)
    tile = TILE.get(y.device.type, TILE["cuda"])
    step = max(1, min(places, tile // M))
    codes = []
    for first in range(0, places, step):
        own = y[:, first : first + step]
        norms = S[first : first + step].flatten(1) @ squares.T  # (step, M)
        rows = max(1, tile // (M * own.shape[1]))
        parts = []
        for part in own.split(rows):
            scores = (part.flatten(0, 1) @ (words.T * -2)).view(-1, own.shape[1], M).add_(norms)
            parts.append(smallest(scores.flatten(0, 1), 1)[1].view(-1, own.shape[1]))
        codes.append(torch.cat(parts))
    return torch.cat(codes, 1).unsqueeze(2)


def _centroids(y: Tensor, weights: Tensor, S: Tensor, words: Tensor, codes: Tensor) -> Tensor:  # noqa: N803
    """The best word for each set of points; a word without points stays as it is."""
    G = y.shape[2]  # noqa: N806
    sums = Codes(codes, words.shape[0])
    target = sums.scatter((y * weights.unsqueeze(2)).flatten(1))[0].double()  # (M, G)
    matrix = sums.scatter_places(S.flatten(1), weights)[0].view(-1, G, G).double()
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(G, dtype=matrix.dtype, device=y.device)
    matrix += torch.where(mean > 0, mean * RIDGE, 1.0)[:, None, None] * eye
    solved = torch.linalg.solve(matrix, target)
    return torch.where((mean > 0).unsqueeze(1), solved.float(), words)
