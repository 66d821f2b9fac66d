"""A Linear whose weight stays packed in 4 bits, on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.formats.int4_kernels import Kernel, kernel_for
from backend.formats.weight import QuantizedWeight


class PackedInt4Linear(nn.Module):
    """y = x W.T + b with W = (q - 8) * scale + (8 - zero) * scale, one copy of q at half a byte per weight.

    Few rows of x (decoding) go through torch's packed int4 kernel; for many rows (prompts) W is dequantised
    for the call and dropped. Shapes or devices without a kernel always take the second way. Both ways read the
    same numbers: scale and shift (8 - zero) * scale, rounded to the module's dtype.

    Args:
        weight: Codes 0..15 with scales and zeros.
        bias: (out,) or None.
        dtype: Type of x and y.
        device: Where the module lives; it cannot be moved afterwards, the packed layout belongs to the device.
    """

    packed: Tensor
    scales_and_shifts: Tensor
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
        device = torch.device(device)
        self.out_features, self.in_features = weight.q.shape
        self.group_size = weight.group_size
        kernel = kernel_for(device)
        takes = kernel is not None and kernel.takes(self.out_features, self.in_features, self.group_size, dtype)
        self._kernel: Kernel | None = kernel if takes else None
        self._max_rows = self._kernel.max_rows if self._kernel else 0
        q = weight.q.to(device)
        packed = self._kernel.pack(q) if self._kernel else q[:, 0::2] | (q[:, 1::2] << 4)
        scale = weight.scale.to(device, torch.float32)
        shift = (8 - weight.zero.to(device, torch.float32)) * scale
        both = torch.stack((scale, shift), dim=-1).transpose(0, 1)  # (in/group, out, 2)
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales_and_shifts", both.to(dtype).contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.numel() // self.in_features
        if rows > self._max_rows or self._kernel is None:
            return nn.functional.linear(x, self.dequantize(), self.bias)
        flat = x.reshape(rows, self.in_features)
        y = self._kernel.multiply(flat, self.packed, self.group_size, self.scales_and_shifts)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the module's dtype."""
        if self._kernel:
            q = self._kernel.unpack(self.packed, self.out_features, self.in_features)
        else:
            q = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(1)
        scale, shift = self.scales_and_shifts.permute(2, 1, 0).contiguous().unsqueeze(-1)  # (out, in/group, 1)
        centred = q.to(scale.dtype).sub_(8).view(self.out_features, -1, self.group_size)
        return torch.addcmul(shift, centred, scale).view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        way = "kernel" if self._kernel else "dequantise"
        return f"in={self.in_features}, out={self.out_features}, group_size={self.group_size}, {way}"
