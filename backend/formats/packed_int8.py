"""A Linear with 5 to 8 bits per weight in two planes of 4, and the choice of the packed Linear for any weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.weight import QuantizedWeight

MIDDLE = 128


class PackedInt8Linear(nn.Module):
    """y = x W.T + b with W = (q - zero) * scale and q = 16 * high + low, each half a `PackedInt4Linear`.

    W = (high - zero / 16) * 16 scale + low * scale, and 16 * scale rounds nothing. Thus the 4-bit kernels also
    serve 8 bits, at one byte per weight.

    Args:
        weight: Codes of at most 8 bits with scales and zeros; an even number of inputs.
        bias: (out,) or None.
        dtype: Type of x and y.
        device: Where the module lives; it cannot be moved afterwards.
    """

    bias: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        up = MIDDLE - (1 << (weight.bits - 1))  # a symmetric weight's zero becomes 128, and the high shift 0
        q, scale = weight.q + up, weight.scale.float()
        high = QuantizedWeight(q >> 4, 16 * scale, (weight.zero.float() + up) / 16)
        low = QuantizedWeight(q & 15, scale, torch.zeros_like(scale))
        self.high = PackedInt4Linear(high, dtype=dtype, device=device)
        self.low = PackedInt4Linear(low, dtype=dtype, device=device)
        self.out_features, self.in_features = q.shape
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if not self.high.takes_rows(x.numel() // self.in_features):
            return nn.functional.linear(x, self.dequantize(), self.bias)
        y: Tensor = self.high(x)
        y += self.low(x)
        return y if self.bias is None else y.add_(self.bias)

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the module's dtype."""
        return self.high.dequantize().add_(self.low.dequantize())


class PermutedLinear(nn.Module):
    """A Linear whose inputs are taken in another order: GPTQ's groups may be any inputs, the kernels' are runs.

    Args:
        inner: The Linear for the permuted inputs.
        order: Input of x for each input of `inner`, (in,).
    """

    order: Tensor

    def __init__(self, inner: nn.Module, order: Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("order", order)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        y: Tensor = self.inner(x.index_select(-1, self.order))
        return y


def packed_linear(
    weight: QuantizedWeight, bias: Tensor | None, *, dtype: torch.dtype, device: torch.device | str
) -> nn.Module:
    """The smallest Linear that runs a quantized weight: nibbles, two planes of nibbles, else the 16-bit weight."""
    out, width = weight.q.shape
    if width % 2 == 0:
        packed = PackedInt4Linear if weight.bits <= 4 else PackedInt8Linear
        return packed(weight, bias, dtype=dtype, device=device)
    with torch.device("meta"):
        linear = nn.Linear(width, out, bias=bias is not None)
    linear.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)
    return linear
