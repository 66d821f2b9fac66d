"""What is known about one input of a decoder layer: its Gram matrix, and what algorithms derive from it."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.fold import Fold
from backend.quantize.gptq import Factor, factorize


class Site:
    """An input that one or more Linears share.

    Derived matrices are made when first asked for and kept, so that many configurations share them.

    Args:
        linears: Names of the Linears inside the layer.
        H: Gram matrix X^T X, (in, in), float32.
        mean_abs: Mean |x|, (in,).
        fold: Where a scale of the input can go, if anywhere.
        fast: Type in which error energies of rounding may be computed.
    """

    def __init__(
        self,
        linears: tuple[str, ...],
        H: Tensor,
        mean_abs: Tensor,
        fold: Fold | None,
        fast: torch.dtype,  # noqa: N803
    ) -> None:
        self.linears, self.H, self.mean_abs, self.fold = linears, H, mean_abs, fold
        self._fast_dtype = fast
        self._fast: Tensor | None = None
        self._factors: dict[tuple[float, bool], Factor | None] = {}

    @property
    def fast_H(self) -> Tensor:  # noqa: N802
        """H in the fast type."""
        if self._fast is None:
            self._fast = self.H.to(self._fast_dtype)
        return self._fast

    def factor(self, damp: float, act_order: bool) -> Factor | None:
        """What GPTQ needs of H; None if H is beyond repair."""
        key = (damp, act_order)
        if key not in self._factors:
            self._factors[key] = factorize(self.H, damp, act_order)
        return self._factors[key]

    def blocks(self, size: int, columns: Tensor | None) -> Tensor:
        """Diagonal blocks of H, of the scaled input if `columns` (in,) were multiplied, in the fast type.

        Returns:
            (in/size, size, size).
        """
        blocks = torch.stack([self.H[at : at + size, at : at + size] for at in range(0, self.H.shape[0], size)])
        if columns is not None:
            c = columns.view(-1, size)
            blocks = blocks / c.unsqueeze(-1) / c.unsqueeze(-2)
        return blocks.to(self._fast_dtype)
