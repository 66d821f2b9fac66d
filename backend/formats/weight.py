"""A quantized weight as plain arrays: what algorithms produce and checkpoint formats pack."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuantizedWeight:
    """W = (q - zero) * scale, with one scale and one zero per row and group of `group_size` inputs.

    Attributes:
        q: uint8 codes, 0 to 2^bits - 1, (out, in).
        scale: Steps in the 16-bit type in which they are stored, (out, in / group_size).
        zero: uint8 codes that stand for 0, (out, in / group_size).
        bits: Bits per code.
        symmetric: Every zero is the middle code, 2^(bits - 1), and need not be stored.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    bits: int = 4
    symmetric: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.q.shape[0], self.q.shape[1]

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.q.shape[1] // self.scale.shape[1]

    @property
    def per_channel(self) -> bool:
        """Whether each row has a single scale."""
        return self.scale.shape[1] == 1

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that is stored, (out, in); computed in float32 (float64 if asked) and rounded to `dtype`."""
        work = dtype if dtype == torch.float64 else torch.float32
        out, groups = self.scale.shape
        q = self.q.view(out, groups, -1).to(work)
        w = (q - self.zero.to(work).unsqueeze(-1)) * self.scale.to(work).unsqueeze(-1)
        return w.view(out, -1).to(dtype)
