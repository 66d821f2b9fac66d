"""A Linear whose weight stays packed in 4 bits, on CPU and CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.formats.int4_kernels import GROUP_SIZES, Kernel, kernel_for
from backend.formats.weight import QuantizedWeight

MIDDLE = 8  # the code that the kernels take off


class PackedInt4Linear(nn.Module):
    """y = x W.T + b with W = (q - 8) * scale + (8 - zero) * scale, one copy of q at half a byte per weight.

    Few rows of x (decoding) go through torch's packed int4 kernel; for many rows (prompts) W is dequantised
    for the call and dropped. Shapes or devices without a kernel always take the second way. Both ways read the
    same numbers: scale and shift (8 - zero) * scale, rounded to the module's dtype.

    Codes of fewer bits are moved to the middle of the 16, where the zero of a symmetric weight is 8 and its shift 0.
    Groups that no kernel takes, whole rows for one, are cut into smaller ones with the same scale.

    Args:
        weight: Codes of at most 4 bits with scales and zeros; an even number of inputs.
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
        cut = next((g for g in reversed(GROUP_SIZES) if weight.group_size % g == 0), weight.group_size)
        kernel = kernel_for(device)
        takes = kernel is not None and kernel.takes(self.out_features, self.in_features, cut, dtype)
        self._kernel: Kernel | None = kernel if takes else None
        self._max_rows = self._kernel.max_rows if self._kernel else 0
        up = MIDDLE - (1 << (weight.bits - 1))
        q = weight.q.to(device) + up
        packed = self._kernel.pack(q) if self._kernel else q[:, 0::2] | (q[:, 1::2] << 4)
        scale = weight.scale.to(device, torch.float32)
        shift = (MIDDLE - up - weight.zero.to(device, torch.float32)) * scale
        both = torch.stack((scale, shift), dim=-1).transpose(0, 1)  # (in/group, out, 2)
        if self._kernel and cut != self.group_size:
            both = both.repeat_interleave(self.group_size // cut, dim=0)
            self.group_size = cut
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scales_and_shifts", both.to(dtype).contiguous())
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.numel() // self.in_features
        if not self.takes_rows(rows):
            return nn.functional.linear(x, self.dequantize(), self.bias)
        assert self._kernel is not None
        flat = x.reshape(rows, self.in_features)
        y = self._kernel.multiply(flat, self.packed, self.group_size, self.scales_and_shifts)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], self.out_features)

    def takes_rows(self, rows: int) -> bool:
        """Whether the kernel multiplies this many rows of x."""
        return self._kernel is not None and rows <= self._max_rows

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the module's dtype."""
        if self._kernel:
            q = self._kernel.unpack(self.packed, self.out_features, self.in_features)
        else:
            q = torch.stack((self.packed & 15, self.packed >> 4), dim=-1).flatten(1)
        scale, shift = self.scales_and_shifts.permute(2, 1, 0).contiguous().unsqueeze(-1)  # (out, in/group, 1)
        centred = q.to(scale.dtype).sub_(MIDDLE).view(self.out_features, -1, self.group_size)
        return torch.addcmul(shift, centred, scale).view(self.out_features, self.in_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        way = "kernel" if self._kernel else "dequantise"
        return f"in={self.in_features}, out={self.out_features}, group_size={self.group_size}, {way}"
