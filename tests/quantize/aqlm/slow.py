"""AQLM's search written slowly, in float64 and from the definitions, and data to try both on."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.metric import Metric


def gram(width: int, tokens: int = 600, seed: int = 0) -> Tensor:
    """Of correlated inputs with a few loud channels, (width, width), float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.3 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, ::13] *= 6.0
    return x.double().T @ x.double() / tokens


def weight(out: int, width: int, seed: int = 1) -> Tensor:
    """Normal weights in rows of different magnitude, (out, width), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator) * torch.rand(out, 1, generator=generator).add(0.5) * 0.03


def codebooks(K: int, M: int, G: int, seed: int = 2) -> Tensor:  # noqa: N803
    """Normal words, each codebook with smaller ones than the one before, (K, M, G), float32."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(K, M, G, generator=generator) * (0.5 ** torch.arange(K)).view(-1, 1, 1)


def random_codes(out: int, groups: int, K: int, M: int, seed: int = 3) -> Tensor:  # noqa: N803
    """(out, groups, K), int32."""
    return torch.randint(0, M, (out, groups, K), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def sums(codes: Tensor, words: Tensor) -> Tensor:
    """The weight of codes (out, groups, K) and codebooks (K, M, G) without scales, (out, groups * G), float64."""
    out, groups, _ = codes.shape
    total = torch.zeros(out, groups, words.shape[2], dtype=torch.float64)
    for k, book in enumerate(words.double()):
        total += book[codes[:, :, k].long()]
    return total.flatten(1)


def loss(D: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    """D H D^T of each row, (out,), float64."""
    D, H = D.double(), H.double()  # noqa: N806
    return ((D @ H) * D).sum(1)


def all_sums(words: Tensor) -> Tensor:
    """Every sum of one word of each codebook, (M ** K, G), float64."""
    total = words[0].double()
    for book in words[1:].double():
        total = (total.unsqueeze(1) + book).flatten(0, 1)
    return total


def feedback(V: Tensor, metric: Metric, words: Tensor) -> tuple[Tensor, Tensor]:
    """Error feedback from the definition: each group is coded for the best that the groups after it could still do.

    Minimising over all later groups, as real numbers, leaves the Schur complement of H as a group's own metric. All
    sums of codewords are tried.

    Returns:
        The coded weight (out, in), and what each group's code cost, (out, in / G).
    """
    V, H, G = V.double(), metric.H.double(), metric.size  # noqa: N806
    width, table, Q = V.shape[1], all_sums(words), torch.zeros_like(V)  # noqa: N806
    costs = []
    for a in range(0, width, G):
        b = a + G
        later = torch.linalg.inv(H[b:, b:])
        # With x = (D_before, d): the least over D_later of the loss is x S x^T, S the Schur complement of H[b:, b:].
        S = H[:b, :b] - H[:b, b:] @ later @ H[b:, :b]  # noqa: N806
        S_jj, S_before = S[a:, a:], S[:a, a:]  # noqa: N806
        target = V[:, a:b] + (V[:, :a] - Q[:, :a]) @ S_before @ torch.linalg.inv(S_jj)
        miss = target.unsqueeze(1) - table  # (out, sums, G)
        cost = ((miss @ S_jj) * miss).sum(2)
        best, which = cost.min(1)
        Q[:, a:b] = table[which]
        costs.append(best)
    return Q, torch.stack(costs, 1)
