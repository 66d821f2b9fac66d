"""Sums over codes: from codebooks to a weight (gather), and from a weight's gradient to its codewords (scatter).

Both are `embedding_bag`, which is fast on CPUs and adds in a fixed order everywhere; a scatter sums the groups of a
word after one sort of the codes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


class Codes:
    """Codes of a weight, ready for sums.

    Args:
        codes: (out, in / G, K), int32.
        words: M, words of a codebook.
    """

    def __init__(self, codes: Tensor, words: int) -> None:
        out, groups, K = codes.shape  # noqa: N806
        self.shape, self.words = (out, groups, K), words
        offsets = torch.arange(K, dtype=torch.int32, device=codes.device) * words
        self._flat = (codes + offsets).view(-1, K)
        self._sorted: tuple[Tensor, Tensor] | None = None

    def gather(self, codebooks: Tensor) -> Tensor:
        """The sums of codewords (out, in) for codebooks (K, M, G)."""
        out, groups, _ = self.shape
        table = codebooks.flatten(0, 1)
        return F.embedding_bag(self._flat, table, mode="sum").view(out, groups * table.shape[1])

    def scatter(self, values: Tensor) -> Tensor:
        """Sums of the groups of (out, in) per codeword: (K, M, G)."""
        out, groups, K = self.shape  # noqa: N806
        members, starts = self._members()
        sums = F.embedding_bag(members, values.view(out * groups, -1), starts, mode="sum")
        return sums.view(K, self.words, -1)

    def scatter_places(self, table: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums per codeword of what belongs to the groups' places.

        Args:
            table: (in / G, X).
            weights: Of the groups, (out, in / G), or of the rows, (out, 1).

        Returns:
            (K, M, X).
        """
        out, groups, K = self.shape  # noqa: N806
        members, starts = self._members()
        each = F.embedding(members, weights.to(table.dtype).expand(out, groups).reshape(-1, 1)).flatten()
        sums = F.embedding_bag(members % groups, table, starts, mode="sum", per_sample_weights=each)
        return sums.view(K, self.words, -1)

    def _members(self) -> tuple[Tensor, Tensor]:
        """Groups sorted by codeword, the K codebooks one after the other, and where each codeword's groups start."""
        if self._sorted is None:
            out, groups, K = self.shape  # noqa: N806
            keys = self._flat.T.flatten()
            order = keys.argsort(stable=True)
            counts = torch.bincount(keys, minlength=K * self.words)
            self._sorted = (order % (out * groups)).int(), (counts.cumsum(0) - counts).int()
        return self._sorted
