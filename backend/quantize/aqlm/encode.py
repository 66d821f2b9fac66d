"""The nearest sums of codewords: all groups of one place, in blocks that stay in a CPU's cache.

Distances are one matrix product, their smallest entries are found without `argmin`, which is many times slower than
`amin` on CPUs: an entry's index takes the place of the last bits of its mantissa. The error is below 2^-15 of a
distance.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

INDEX_WORDS = 256  # words whose index goes into a mantissa: 8 of 23 bits
CROSS_WORDS = 512  # up to here the products of all words of two codebooks are kept at hand
TILE = {"cpu": 2**17, "cuda": 2**27}  # distances that are computed at a time
SPREAD = 2  # ways in which a path goes on in the middle codebooks


class Encoder:
    """Codebooks as several places of a row see them: whitened by the place's own metric.

    Args:
        codebooks: C, (K, M, G).
        whiten: A matrix per place, (n, G, G); errors e of place j cost ||e whiten_j||^2.
        candidates: A, words of the first codebook that are tried; a power of two.
    """

    def __init__(self, codebooks: Tensor, whiten: Tensor, candidates: int) -> None:
        K, M, G = codebooks.shape  # noqa: N806
        self.words = (codebooks.view(1, K * M, G) @ whiten).view(-1, K, M, G)
        norms = self.words.square().sum(-1, keepdim=True)
        self._products = torch.cat([self.words * -2, norms], -1).transpose(2, 3).contiguous()  # (n, K, G + 1, M)
        self._candidates = min(candidates, M)
        self._cross = K == 2 and M <= CROSS_WORDS
        tile = TILE.get(codebooks.device.type, TILE["cuda"])
        self._rows = max(1, tile // (M * (1 if K == 1 or self._cross else self._candidates)))

    def encode(self, t: Tensor, place: int, keep: int = 1) -> tuple[Tensor, Tensor]:
        """Nearest sums of codewords.

        For one codebook they are exact. For two, each of the A candidates of the first gets its nearest partner. With
        more, A paths go from codebook to codebook.

        Args:
            t: Whitened targets, (N, G).
            place: Which of the n places they belong to.
            keep: How many sums per target, at most A.

        Returns:
            Codes (N, keep, K) int32, and squared distances (N, keep), ascending.
        """
        cross = None
        if self._cross:
            first, second = self.words[place]
            cross = (first * 2) @ second.T
        parts = [self._tile(part, place, keep, cross) for part in t.split(self._rows)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat([codes for codes, _ in parts]), torch.cat([errors for _, errors in parts])

    def sums(self, codes: Tensor, place: int) -> Tensor:
        """Whitened sums of codewords, (N, K) -> (N, G)."""
        total = F.embedding(codes[:, 0], self.words[place, 0])
        for k in range(1, codes.shape[1]):
            total += F.embedding(codes[:, k], self.words[place, k])
        return total

    def _tile(self, t: Tensor, place: int, keep: int, cross: Tensor | None) -> tuple[Tensor, Tensor]:
        K = self.words.shape[1]  # noqa: N806
        x = F.pad(t, (0, 1), value=1.0)
        energy = t.square().sum(1, keepdim=True)
        scores = x @ self._products[place, 0]
        if K == 1:
            errors, first = smallest(scores, 1 if keep == 1 else self._candidates)
            errors, chosen = ranked(errors, keep)
            return first.gather(1, chosen).unsqueeze(2), errors + energy
        errors, first = smallest(scores, self._candidates)
        if cross is None:
            return self._paths(t, place, keep, errors + energy, first)
        codes, errors = self._pair(x, place, keep, cross, errors, first)
        return codes, errors + energy

    def _pair(
        self, x: Tensor, place: int, keep: int, cross: Tensor, errors: Tensor, first: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Two codebooks: the exact partner of every candidate, by ||c||^2 - 2 t c plus a row of cross products."""
        partner = x @ self._products[place, 1]  # (N, M)
        gains = [F.embedding(first[:, a], cross).add_(partner).amin(1) for a in range(first.shape[1])]
        errors, chosen = ranked(errors + torch.stack(gains, 1), keep)
        first = first.gather(1, chosen)
        second = [smallest(F.embedding(first[:, b], cross).add_(partner), 1)[1] for b in range(keep)]
        return torch.stack([first, torch.cat(second, 1)], 2), errors

    def _paths(self, t: Tensor, place: int, keep: int, errors: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        """Any number of codebooks: A paths, of which each goes on in the best ways."""
        K, M, G = self.words.shape[1:]  # noqa: N806
        codes = first.unsqueeze(2)
        rest = t.unsqueeze(1) - F.embedding(first, self.words[place, 0])  # (N, A, G)
        for k in range(1, K):
            last, paths = k == K - 1, codes.shape[1]
            ways = 1 if last else min(SPREAD, M)
            scores = F.pad(rest.reshape(-1, G), (0, 1), value=1.0) @ self._products[place, k]
            gains, words = smallest(scores, ways)
            errors = (errors.unsqueeze(2) + gains.view(-1, paths, ways)).flatten(1)
            words = words.view(-1, paths * ways)
            errors, chosen = ranked(errors, keep if last else min(self._candidates, errors.shape[1]))
            parent = (chosen // ways).unsqueeze(2)
            words = words.gather(1, chosen)
            codes = torch.cat([codes.gather(1, parent.expand(-1, -1, k)), words.unsqueeze(2)], 2)
            if not last:
                rest = rest.gather(1, parent.expand(-1, -1, G)) - F.embedding(words, self.words[place, k])
        return codes, errors


def smallest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Small entries of each row: the smallest one of each of `count` equal classes of columns.

    Args:
        scores: (N, M), float32, finite; M a power of two. Overwritten.
        count: A power of two up to M. The classes are the columns of like index modulo `count`, or contiguous ones.

    Returns:
        Entries (N, count) and their columns, int32; the least of them is the least of the row.
    """
    N, M = scores.shape  # noqa: N806
    width = M if M <= INDEX_WORDS else min(INDEX_WORDS, M // count)
    index = torch.arange(width, dtype=torch.int32, device=scores.device)
    scores.view(torch.int32).view(-1, width).bitwise_and_(-width).bitwise_or_(index)
    if width < M:
        blocks = scores.view(-1, width).amin(1).view(N, count, -1)
        least, block = blocks.min(2)
        block += torch.arange(count, device=scores.device) * blocks.shape[2]
        return least, (block * width).int() + (least.view(torch.int32) & (width - 1))
    if count == 1:
        least = scores.amin(1, keepdim=True)
    else:  # halves against each other: vectors, where `amin` over few columns would be scalar
        while scores.shape[1] > count:
            scores = torch.minimum(*scores.chunk(2, 1))
        least = scores
    return least, least.contiguous().view(torch.int32) & (width - 1)


def ranked(errors: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The `keep` smallest entries of (N, A), ascending, and their columns."""
    if keep == 1:
        return errors.min(1, keepdim=True)
    return errors.topk(keep, dim=1, largest=False)
