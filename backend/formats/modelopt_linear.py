"""A Linear as nvidia-modelopt quantized it: the stored weight dequantised, the rounding of its inputs simulated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.formats.modelopt_layout import NVFP4_BLOCK

FP8, INT8, NVFP4 = "fp8", "int8", "nvfp4"
"""Types that inputs are rounded to."""
E4M3_MAX, E2M1_MAX = 448.0, 6.0
LARGEST = {FP8: E4M3_MAX, INT8: 127.0}
SMALLEST_SCALE = 2.0**-9
"""The smallest positive number of FP8 E4M3."""
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of FP4 E2M1, by code."""
ACTIVATIONS = {
    FP8: "FP8 rounding of inputs simulated",
    INT8: "int8 rounding of inputs simulated",
    NVFP4: "NVFP4 rounding of inputs simulated",
}


@dataclass(frozen=True)
class ModeloptWeight:
    """What one quantized Linear of modelopt's computes with.

    Attributes:
        weight: float32, dequantised, (out, in).
        label: Of its type, e.g. `W4A16_AWQ`.
        pre_quant_scale: Factors of the inputs before anything else, (in,); None: 1.
        input_scale: Step of the inputs' rounding, a scalar; None if they are not rounded.
        rounding: `fp8`, `int8`, `nvfp4`, or empty for weight-only.
    """

    weight: Tensor
    label: str
    pre_quant_scale: Tensor | None = None
    input_scale: Tensor | None = None
    rounding: str = ""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.weight.shape[0], self.weight.shape[1]


class ModeloptLinear(nn.Module):
    """y = round(x * s) W.T + b with the dequantised W, the factors s of the inputs, and their rounding.

    The rounding is what kernels do with 8-bit or 4-bit inputs, computed in float32 and multiplied back: results are
    those of the quantized model, speed and memory are not.

    Args:
        stored: Weight and scales.
        bias: (out,) or None.
        dtype: Type of weight, x and y.
        device: Where the module lives.
    """

    weight: Tensor
    pre_quant_scale: Tensor | None
    input_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, stored: ModeloptWeight, bias: Tensor | None = None, *, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.rounding = stored.rounding
        told = f", {ACTIVATIONS[stored.rounding]}" if stored.rounding else ""
        name = str(dtype).removeprefix("torch.")
        self.decode_path = f"modelopt {stored.label}: dequantised once to {name} weights{told}"
        self.register_buffer("weight", stored.weight.to(device, dtype))
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype))
        factors = stored.pre_quant_scale
        self.register_buffer("pre_quant_scale", None if factors is None else factors.to(device, dtype))
        step = stored.input_scale
        self.register_buffer("input_scale", None if step is None else step.to(device, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        if self.input_scale is not None:
            x = round_inputs(x, self.input_scale, self.rounding)
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"in={self.in_features}, out={self.out_features}, {self.decode_path}"


def round_inputs(x: Tensor, scale: Tensor, rounding: str) -> Tensor:
    """The values nearest to x that a type can hold, in x's own type.

    Args:
        x: (..., in).
        scale: float32 scalar: what 1 in that type stands for (NVFP4: what 1 stands for where a block's scale is 1).
        rounding: `fp8` (E4M3), `int8`, or `nvfp4` (E2M1 with an E4M3 scale for each 16 inputs, found on the way).
    """
    if rounding in LARGEST:
        inverse = LARGEST[rounding] / (scale * LARGEST[rounding])  # modelopt's arithmetic: near ties it rounds alike
        scaled = x.float() * inverse
        rounded = to_e4m3(scaled) if rounding == FP8 else scaled.round().clamp(-128, 127)
        return (rounded / inverse).to(x.dtype)
    scaled = x.float() / scale
    blocks = scaled.unflatten(-1, (-1, NVFP4_BLOCK))
    steps = (blocks.abs().amax(-1, keepdim=True) / E2M1_MAX).clamp(SMALLEST_SCALE, E4M3_MAX)
    steps = to_e4m3(steps)
    return (to_e2m1(blocks / steps) * (steps * scale)).flatten(-2).to(x.dtype)


def to_e4m3(x: Tensor) -> Tensor:
    """float32 values rounded to FP8 E4M3, the ends of its range at most; ties to even."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def to_e2m1(x: Tensor) -> Tensor:
    """float32 values rounded to FP4 E2M1, the ends of its range at most; ties to even.

    Below 2 its steps are 0.5, below 4 they are 1, then 2; `torch.round` takes ties to even, and so does the format,
    as an even code is an even multiple of its step.
    """
    size = x.abs().clamp(max=E2M1_MAX)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    return torch.copysign((size / step).round() * step, x)
