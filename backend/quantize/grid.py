"""Uniform integer grids per group of inputs: from a weight to codes, scales and zeros.

The step sizes are rounded to float16, as they are stored, before the codes are chosen: what is stored is what
was optimised. Works for 2 to 8 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.formats.weight import QuantizedWeight

MIN_STEP = 2.0**-24  # smallest positive float16


@dataclass(frozen=True)
class Grid:
    """A family of grids.

    Attributes:
        bits: Bits per code, 2 to 8.
        group_size: Inputs that share a grid.
        zero_point: True: a zero code per group, chosen from the group's range. False: the middle code is 0.
    """

    bits: int
    group_size: int
    zero_point: bool

    @property
    def levels(self) -> int:
        """Largest code."""
        return 2**self.bits - 1

    def grouped(self, w: Tensor) -> Tensor:
        """(..., in) -> (..., in/group, group), a view."""
        return w.unflatten(-1, (-1, self.group_size))

    def fit(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero of each group from the range of its values.

        Args:
            groups: (..., group), float32 or float64.

        Returns:
            scale and zero (..., 1) in the type of `groups`; scale is a float16 number, zero a code.
        """
        if self.zero_point:
            # Two reductions: aminmax along rows is ten times slower on CPU. The grid must hold 0.
            low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
            scale = _as_float16((high - low) / self.levels)
            return scale, (-low / scale).round_().clamp_(0, self.levels)
        middle = 2 ** (self.bits - 1)
        scale = _as_float16(groups.abs().amax(-1, keepdim=True) / (middle - 1))
        return scale, torch.full_like(scale, middle)

    def shrink(self, scale: Tensor, factor: float) -> Tensor:
        """The steps of the same grids with their ranges times `factor`; zeros stay valid, values beyond are clipped."""
        return _as_float16(scale * factor)

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

    def encode(self, w: Tensor, scale: Tensor, zero: Tensor) -> QuantizedWeight:
        """Round a weight (out, in) to given grids, scale and zero (out, in/group, 1)."""
        q = self.codes(self.grouped(w), scale, zero).to(torch.uint8).flatten(-2)
        return QuantizedWeight(q, scale.squeeze(-1).to(torch.float16), zero.squeeze(-1).to(torch.uint8))


def _as_float16(scale: Tensor) -> Tensor:
    return scale.clamp(MIN_STEP, 65504.0).to(torch.float16).to(scale.dtype)
