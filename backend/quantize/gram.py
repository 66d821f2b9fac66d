"""Gram matrices of layer inputs, accumulated in float32 while the calibration text passes by."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCKS = 4  # X^T X is symmetric: with 4 block rows, 10 of 16 blocks are computed
MIN_BLOCK = 64


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
        step = max(MIN_BLOCK, -(-width // BLOCKS))
        self._blocks = [(a, min(width, a + step)) for a in range(0, width, step)]

    def add(self, x: Tensor) -> None:
        """Add a part of X, (..., width). Products and sums are float32 whatever the type of x."""
        part = x.reshape(-1, x.shape[-1])
        self._abs += part.abs().sum(0, dtype=torch.float32)
        part = part.float()
        for a, b in self._blocks:  # block rows of the upper triangle
            self._sum[a:b, a:].addmm_(part[:, a:b].T, part[:, a:])
        self.tokens += part.shape[0]

    @property
    def H(self) -> Tensor:  # noqa: N802 - the papers' name
        """X^T X, (width, width); symmetric. Ends the accumulation."""
        for a, b in self._blocks:
            self._sum[b:, a:b] = self._sum[a:b, b:].T
        return self._sum

    @property
    def mean_abs(self) -> Tensor:
        """Mean |x| per feature, (width,)."""
        return self._abs / max(self.tokens, 1)


def error_energy(e: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    """Energy of the output error of each row, diag(E H E^T): (..., out, in), (in, in) -> (..., out).

    Equals sum over tokens of (x . e)^2 for the X behind H.
    """
    return torch.linalg.vecdot(e @ H, e)
