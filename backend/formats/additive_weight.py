"""A weight whose groups are sums of codewords, as plain arrays: what AQLM's search produces and its format packs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class AdditiveWeight:
    """W[o, j * G + t] = scales[o] * sum over k of codebooks[k, codes[o, j, k], t].

    Attributes:
        codes: int32, 0 to 2^B - 1, (out, in / G, K).
        codebooks: Codewords, (K, 2^B, G); float32 while they are being fitted, float16 once they are what is stored.
        scales: One per row, (out,), in the type of `codebooks`.
    """

    codes: Tensor
    codebooks: Tensor
    scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1] * self.codebooks.shape[2]

    @property
    def nbits_per_codebook(self) -> int:
        """B."""
        return self.codebooks.shape[1].bit_length() - 1

    def stored(self) -> AdditiveWeight:
        """The same with codebooks and scales rounded to float16, as a checkpoint holds them."""
        return AdditiveWeight(self.codes, self.codebooks.half(), self.scales.half())

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in); computed in float32 (float64 if asked) and rounded to `dtype`."""
        work = dtype if dtype == torch.float64 else torch.float32
        K, M, G = self.codebooks.shape  # noqa: N806
        out, groups, _ = self.codes.shape
        offsets = torch.arange(K, device=self.codes.device, dtype=self.codes.dtype) * M
        flat = (self.codes + offsets).view(out * groups, K)
        table = self.codebooks.to(work).reshape(K * M, G)
        w = torch.nn.functional.embedding_bag(flat, table, mode="sum").view(out, groups * G)
        return (w * self.scales.to(work).unsqueeze(1)).to(dtype)
