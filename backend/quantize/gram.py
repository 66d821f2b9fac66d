"""Gram matrices of layer inputs, accumulated while the calibration text passes by.

Sums are float32. Products are float32 too, unless x is bfloat16: then each part's X^T X is computed by the
bfloat16 units, which accumulate in float32 and round every entry once, on CPU to bfloat16. Entries are then off
by at most 2^-8 of each part's product. The roundings are independent, so over n parts the sum is off by about
2^-9 / sqrt(n) of an entry, root mean square (n = 16 at 128 x 512 tokens: 0.05 %), far below what another text would
change.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256  # rows of the upper triangle computed at a time: X^T X is symmetric


class Gram:
    """H = X^T X and mean |x| of an input X (tokens, width) that comes in parts.

    Args:
        width: Features of X.
        device: Where H lives.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self._sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._abs = torch.zeros(width, dtype=torch.float32, device=device)
        self.tokens = 0
        self._blocks = [(a, min(width, a + BLOCK)) for a in range(0, width, BLOCK)]

    def add(self, x: Tensor) -> None:
        """Add a part of X, (..., width)."""
        part = x.reshape(-1, x.shape[-1])
        if part.dtype != torch.bfloat16:
            part = part.float()
        self._abs += product(part.new_ones(1, part.shape[0]), part.abs())[0]
        for a, b in self._blocks:
            self._sum[a:b, a:] += product(part[:, a:b].T, part[:, a:])
        self.tokens += part.shape[0]

    @property
    def H(self) -> Tensor:  # noqa: N802 - the papers' name
        """X^T X, (width, width); symmetric. Ends the accumulation."""
        for a, b in self._blocks:
            self._sum[b:, a:b] = self._sum[a:b, b:].T
            self._sum[a:b, a:b] = self._sum[a:b, a:b].triu() + self._sum[a:b, a:b].triu(1).T
        return self._sum

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per feature, (width,)."""
        return self._abs / max(self.tokens, 1)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is computed natively, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def product(a: Tensor, b: Tensor) -> Tensor:
    """A @ b of two matrices, summed in float32; of bfloat16 ones the result is rounded to bfloat16 on CPU only."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def error_energy(e: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    """Energy of the output error of each row, diag(E H E^T): (..., out, in), (in, in) -> (..., out).

    Equals sum over tokens of (x . e)^2 for the X behind H. With a bfloat16 H the product E H is a bfloat16 one,
    which is several times faster where the CPU has such units; for errors of rounding, whose entries are
    independent, the energy is then off by less than 2^-8 of itself.
    """
    return torch.linalg.vecdot((e.to(H.dtype) @ H).to(e.dtype), e)


def energy_change(before: Tensor, after: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    """`error_energy(after) - error_energy(before)` in one product instead of two, and free of their cancellation."""
    return torch.linalg.vecdot(((after - before).to(H.dtype) @ H).to(after.dtype), after + before)
