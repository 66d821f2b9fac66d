"""What can be asked of AWQ, and what it reports back."""

from __future__ import annotations

from dataclasses import dataclass, field

from backend.errors import ConfigError


@dataclass(frozen=True)
class AwqSettings:
    """Settings of one AWQ run.

    Attributes:
        bits: Bits per weight; the AutoAWQ layouts hold 4.
        group_size: Weights along the input that share a scale and a zero; must divide every input width.
        zero_point: True: asymmetric codes with a zero per group. False: symmetric, zero = 8 everywhere.
        scale_grid: Number of ratios tried in the scale search, 0 to (n - 1) / n. 0 switches it off.
        clip: Search for a smaller range per row and group.
        modules_to_not_convert: Linears whose name contains one of these stay in 16 bits.

    Raises:
        ConfigError: If a value is out of range.
    """

    bits: int = 4
    group_size: int = 128
    zero_point: bool = True
    scale_grid: int = 20
    clip: bool = True
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ConfigError(f"found {self.bits}; the AutoAWQ format holds 4-bit weights", key="bits", value=self.bits)
        if self.group_size not in (32, 64, 128):
            raise ConfigError(
                f"found {self.group_size}; allowed are 32, 64 and 128", key="group_size", value=self.group_size
            )
        if self.scale_grid < 0:
            raise ConfigError(f"found {self.scale_grid}; 0 or more", key="scale_grid", value=self.scale_grid)


@dataclass(frozen=True)
class LayerReport:
    """What happened to one decoder layer.

    Attributes:
        name: e.g. `model.layers.3`.
        index: Position, from 0.
        total: Number of decoder layers.
        relative_error: Energy of the output error of the layer's quantized Linears on the calibration inputs,
            sum tr(dW H dW^T) / sum tr(W H W^T).
        rtn_relative_error: The same for plain rounding to nearest with the same groups.
        notes: Deviations worth telling, e.g. scales that could not be folded.
        calibrate_s: Seconds for the forward passes and Gram matrices.
        quantize_s: Seconds for the searches, rounding, packing and writing.
    """

    name: str
    index: int
    total: int
    relative_error: float
    rtn_relative_error: float
    notes: tuple[str, ...]
    calibrate_s: float
    quantize_s: float


@dataclass
class QuantizationReport:
    """What happened to the model.

    Attributes:
        layers: One report per decoder layer.
        skipped: Linear name -> why it stays in 16 bits.
        tokens: Calibration tokens seen.
        device: Where it ran.
        compute_dtype: Type of the forward passes.
    """

    layers: list[LayerReport] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    device: str = "cpu"
    compute_dtype: str = "bfloat16"
