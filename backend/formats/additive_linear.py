"""Linears that run an additive weight: packed codes with look-up tables, aqlm's kernels, or dequantised once."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backend.formats import lut_kernel
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.aqlm_package import PackageLinear, package_problem


class AdditiveLinear(nn.Module):
    """y = x W.T + b with W as codes, codebooks and scales, on the CPU.

    Few rows of x (decoding) go through the look-up tables of `backend.formats.lut_kernel`, summed in float32; for
    many (prompts) W is dequantised for the call, in the module's dtype, and dropped.

    Args:
        weight: Codes, codebooks and scales.
        bias: (out,) or None.
        dtype: Type of x and y.
        look_up: Use the tables; codes of at most 8 bits. False: W is dequantised at every call.
    """

    codes: Tensor
    words: Tensor
    scales: Tensor
    bias: Tensor | None

    MAX_ROWS = 12
    """Above this many rows of x, dequantising and multiplying is faster (measured at 2048 and 4096 inputs)."""

    def __init__(
        self, weight: AdditiveWeight, bias: Tensor | None = None, *, dtype: torch.dtype, look_up: bool = True
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self.look_up = look_up
        self.label = label_of(weight)
        size = lut_kernel.tile_size(self.out_features)
        codes = weight.codes.to(torch.uint8) if weight.nbits_per_codebook <= lut_kernel.MAX_NBITS else weight.codes
        tiles = lut_kernel.tile_codes(codes, size)
        scales = torch.nn.functional.pad(weight.scales.float(), (0, len(tiles) * size - self.out_features))
        self.register_buffer("codes", tiles)
        self.register_buffer("words", weight.codebooks.float().transpose(1, 2).contiguous())
        self.register_buffer("scales", scales.view(len(tiles), size))
        self.register_buffer("bias", None if bias is None else bias.to(dtype))

    @property
    def decode_path(self) -> str:
        """How single tokens are computed."""
        how = "look-up tables over packed codes (numba)" if self.look_up else "dequantised at every call"
        return f"{self.label}: {how}"

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        rows = x.numel() // self.in_features
        if not self.look_up or rows > self.MAX_ROWS or (x.requires_grad and torch.is_grad_enabled()):
            return nn.functional.linear(x, self.dequantize(), self.bias)
        flat = x.detach().reshape(rows, self.in_features).to(torch.float32).contiguous()
        y = lut_kernel.multiply(flat, self.codes, self.words, self.scales)[:, : self.out_features]
        if self.bias is not None:
            y = y + self.bias
        return y.to(x.dtype).reshape(*x.shape[:-1], self.out_features)

    def dequantize(self) -> Tensor:
        """The weight (out, in) in the module's dtype; a tile at a time, so that nothing leaves the cache."""
        w = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        codebooks = self.words.transpose(1, 2).contiguous()
        size = self.codes.shape[2]
        for number, (tile, scales) in enumerate(zip(self.codes, self.scales, strict=True)):
            rows = w[number * size : (number + 1) * size]
            codes = tile.t()[: len(rows)].to(torch.int32).view(len(rows), -1, len(codebooks)).contiguous()
            rows.copy_(AdditiveWeight(codes, codebooks, scales[: len(rows)]).dequantize())
        return w

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in={self.in_features}, out={self.out_features}, {self.decode_path}"


class DequantizedLinear(nn.Linear):
    """A Linear with the dequantised weight, which remembers where it comes from.

    Args:
        weight: Codes, codebooks and scales.
        bias: (out,) or None.
        dtype: Type of weight, x and y.
        device: Where the module lives.
        reason: Why it is not run packed; shown with the decode path.
    """

    def __init__(
        self,
        weight: AdditiveWeight,
        bias: Tensor | None = None,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        reason: str = "",
    ) -> None:
        out, width = weight.shape
        super().__init__(width, out, bias=bias is not None, device="meta")
        name = str(dtype).removeprefix("torch.")
        self.decode_path = f"{label_of(weight)}: dequantised once at load, {name}{f' ({reason})' if reason else ''}"
        self.weight = nn.Parameter(weight.dequantize(dtype).to(device), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.to(device, dtype), requires_grad=False)


def label_of(weight: AdditiveWeight) -> str:
    """The scheme of a weight, as people write it: `AQLM 2x8 g8`."""
    K, _, G = weight.codebooks.shape  # noqa: N806
    return f"AQLM {K}x{weight.nbits_per_codebook} g{G}"


def additive_linear(
    weight: AdditiveWeight,
    bias: Tensor | None,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    packed: bool = False,
) -> nn.Module:
    """The fastest Linear that runs an additive weight on a device.

    On the CPU codes of at most 8 bits stay packed; tables of larger codebooks would cost more than the product, so
    these are dequantised once. On CUDA the aqlm package's kernels run, if they are there and right.

    Args:
        weight: Its codes, codebooks and scales.
        bias: (out,) or None.
        dtype: Type of x and y.
        device: Where the module lives.
        packed: On the CPU: keep the codes packed in any case and dequantise at every call if need be, which takes
            the least memory.
    """
    device = torch.device(device)
    reason = ""
    if device.type == "cpu":
        if lut_kernel.serves(weight.nbits_per_codebook):
            return AdditiveLinear(weight, bias, dtype=dtype)
        if packed:
            return AdditiveLinear(weight, bias, dtype=dtype, look_up=False)
        reason = "numba is not installed" if weight.nbits_per_codebook <= lut_kernel.MAX_NBITS else ""
    else:
        scheme = (weight.codebooks.shape[0], weight.nbits_per_codebook, weight.codebooks.shape[2])
        reason = package_problem(scheme, dtype, device)
        if not reason:
            return PackageLinear(weight, bias, dtype=dtype, device=device, label=label_of(weight))
    return DequantizedLinear(weight, bias, dtype=dtype, device=device, reason=reason)
