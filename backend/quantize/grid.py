"""Uniform integer grids per group of inputs: from a weight to codes, scales and zeros.

The step sizes are rounded to the 16-bit type in which they are stored before the codes are chosen: what is stored
is what was optimised.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.formats.weight import QuantizedWeight
from backend.quantize.recipe import PER_CHANNEL, Scheme

MIN_STEP = 2.0**-24  # smallest positive float16
MAX_STEP = 65504.0  # largest float16


@dataclass(frozen=True)
class Grid:
    """A family of grids.

    Attributes:
        bits: Bits per code, 2 to 8.
        group_size: Inputs that share a grid; -1: all of a row.
        symmetric: True: the middle code is 0. False: a zero code per group, chosen from the group's range.
        scale_dtype: Type in which steps are stored, float16 or bfloat16.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: torch.dtype = torch.float16

    @classmethod
    def of(cls, scheme: Scheme, scale_dtype: torch.dtype) -> Grid:
        """The grids of a scheme."""
        return cls(scheme.bits, scheme.group_size, scheme.symmetric, scale_dtype)

    @property
    def levels(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The code that stands for 0 in symmetric grids."""
        return 2 ** (self.bits - 1)

    def grouped(self, w: Tensor) -> Tensor:
        """(..., in) -> (..., in/group, group), a view."""
        return w.unflatten(-1, (-1, w.shape[-1] if self.group_size == PER_CHANNEL else self.group_size))

    def fit(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group from the range of its values.

        Args:
            groups: (..., group), float32 or float64.

        Returns:
            scale and zero (..., 1) in the type of `groups`; scale is a number of `scale_dtype`, zero a code.
        """
        if self.symmetric:
            scale = self.storable(groups.abs().amax(-1, keepdim=True) / (self.middle - 1))
            return scale, torch.full_like(scale, self.middle)
        # Two reductions: aminmax along rows is ten times slower on CPU. The grid must hold 0.
        low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
        scale = self.storable((high - low) / self.levels)
        return scale, (-low / scale).round_().clamp_(0, self.levels)

    def storable(self, scale: Tensor) -> Tensor:
        """Steps rounded to what is stored, in their own type."""
        return scale.clamp(MIN_STEP, MAX_STEP).to(self.scale_dtype).to(scale.dtype)

    def codes(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest codes of (..., group) as floating numbers."""
        return (groups / scale).round_().add_(zero).clamp_(0, self.levels)

    def round(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Nearest points of given grids, (..., group)."""
        return self.codes(groups, scale, zero).sub_(zero).mul_(scale)

    def nearest(self, w: Tensor) -> Tensor:
        """Nearest points of w's own grids: the weight after plain rounding, (..., in)."""
        groups = self.grouped(w)
        return self.round(groups, *self.fit(groups)).flatten(-2)

    def weight(self, q: Tensor, scale: Tensor, zero: Tensor) -> QuantizedWeight:
        """Codes (out, in) with their grids, scale and zero (out, in/group), as they are stored."""
        return QuantizedWeight(
            q.to(torch.uint8), scale.to(self.scale_dtype), zero.to(torch.uint8), self.bits, self.symmetric
        )
