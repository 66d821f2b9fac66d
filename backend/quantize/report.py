"""What quantization reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """What happened to one decoder layer under one recipe.

    Attributes:
        recipe: Name of the recipe.
        name: e.g. `model.layers.3`.
        index: Position, from 0.
        total: Number of decoder layers.
        relative_error: Energy of the output error of the layer's quantized Linears on the calibration inputs,
            sum tr(dW H dW^T) / sum tr(W H W^T), from up to 128 rows of each. Where a Linear was given a corrected
            target to make up for others, W is that target.
        rtn_relative_error: The same for plain rounding to nearest with the same groups.
        notes: Deviations worth telling, e.g. scales that could not be folded, or a singular H.
        calibrate_s: Seconds for the forward passes and Gram matrices, which all recipes share.
        quantize_s: Seconds for the searches, rounding, packing and writing.
    """

    recipe: str
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
        layers: One report per decoder layer and recipe, layer by layer.
        kept: Recipe name -> Linear -> why it stays in 16 bits.
        tokens: Calibration tokens seen.
        device: Where it ran.
        compute_dtype: Type of the forward passes.
        resumed_at: Layer at which an interrupted run was taken up, 0 for a run from the start.
    """

    layers: list[LayerReport] = field(default_factory=list)
    kept: dict[str, dict[str, str]] = field(default_factory=dict)
    tokens: int = 0
    device: str = "cpu"
    compute_dtype: str = "bfloat16"
    resumed_at: int = 0
