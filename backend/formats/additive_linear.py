"""Linears that run an additive weight: dequantised once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.formats.additive_weight import AdditiveWeight


def additive_linear(
    weight: AdditiveWeight, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The Linear that runs an additive weight.

    Args:
        weight: Its codes, codebooks and scales.
        bias: (out,) or None.
        dtype: Type of x and y.
        device: Where the module lives.
    """
    out, width = weight.shape
    with torch.device("meta"):
        linear = nn.Linear(width, out, bias=bias is not None)
    linear.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return linear
