"""First codebooks: residual k-means (Lloyd 1982) on a sample of the groups, in the metric of error feedback.

The point x of place j, in a row of scale s, is s^2 ||(x - c) T_j||^2 away from the word c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.metric import Metric
from backend.quantize.aqlm.nearest import smallest, tile_columns

RIDGE = 1e-6  # of the mean diagonal of a word's normal matrix


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
    found = []
    for _ in range(K):
        words, codes = _kmeans(x, weights, metric, M, iterations, generator)
        x = x - torch.nn.functional.embedding(codes.squeeze(2), words)
        found.append(words)
    return torch.stack(found)


def _sample(
    V: Tensor,  # noqa: N803
    weights: Tensor,
    size: int,
    points: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
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
    metric: Metric,
    M: int,  # noqa: N803
    iterations: int,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Words (M, G) and codes (n, places, 1). Seeds are drawn by their part of the loss."""
    S = metric.T @ metric.T.mT  # (places, G, G)  # noqa: N806
    y = (x.transpose(0, 1) @ S).transpose(0, 1)
    share = (torch.linalg.vecdot(y, x) * weights).flatten().double().clamp_min(0)
    share += share.mean() * 1e-6 + 1e-30
    words = x.flatten(0, 1)[share.multinomial(M, generator=generator)]
    target = (y * weights.unsqueeze(2)).flatten(1)
    codes = _assign(y, S, words)
    for _ in range(iterations):
        words = _centroids(target, weights, S.flatten(1), words, codes)
        before, codes = codes, _assign(y, S, words)
        if torch.equal(before, codes):
            break
    return words, codes


def _assign(y: Tensor, S: Tensor, words: Tensor) -> Tensor:  # noqa: N803
    """The nearest word of each point, by c S c - 2 c S x.

    Args:
        y: S x of the points, (n, places, G).
        S: Of the places, (places, G, G).
        words: (M, G).

    Returns:
        (n, places, 1).
    """
    n, places, G = y.shape  # noqa: N806
    M = len(words)  # noqa: N806
    squares = (words.unsqueeze(2) * words.unsqueeze(1)).flatten(1)  # (M, G * G)
    norms = (squares @ S.flatten(1).T).unsqueeze(2)  # (M, places, 1)
    doubled, columns = words * -2, y.permute(2, 1, 0).reshape(G, -1)  # (G, places * n)
    tile = tile_columns(M, y.device)
    step = max(1, tile // n)  # places at a time; of one place, `tile` points
    codes = []
    for first in range(0, places, step):
        norm = norms[:, first : first + step]
        for part in columns[:, first * n : (first + step) * n].split(tile, 1):
            scores = doubled @ part
            scores.view(M, norm.shape[1], -1).add_(norm)
            codes.append(smallest(scores)[1][0])
    return torch.cat(codes).view(places, n).T.contiguous().unsqueeze(2)


def _centroids(target: Tensor, weights: Tensor, S: Tensor, words: Tensor, codes: Tensor) -> Tensor:  # noqa: N803
    """The best word for each set of points; a word without points stays as it is.

    Args:
        target: Weighted x S of the points, (n, places * G).
        weights: (n, places).
        S: Of the places, (places, G * G).
        words: (M, G).
        codes: (n, places, 1).
    """
    M, G = words.shape  # noqa: N806
    sums = Codes(codes, M)
    right = sums.scatter(target)[0].double()  # (M, G)
    matrix = sums.scatter_places(S, weights)[0].view(M, G, G).double()
    mean = matrix.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(G, dtype=matrix.dtype, device=matrix.device)
    matrix += torch.where(mean > 0, mean * RIDGE, 1.0)[:, None, None] * eye
    return torch.where((mean > 0).unsqueeze(1), torch.linalg.solve(matrix, right).float(), words)
