"""What AQLM's calibration reports about itself."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BlockReport:
    """What happened to one decoder layer.

    The relative errors are squared errors of the layer's output over the energy of what the dense layer adds to its
    input, on the held-out sequences (on all, if none are held out), with the values that are stored.

    Attributes:
        name: e.g. `model.layers.3`.
        index: Position, from 0.
        total: Number of decoder layers.
        linear_error: Of the codes as they were found: sum tr(dW H dW^T) / sum tr(W H W^T) over the layer's Linears.
        relative_error_before: Before block finetuning.
        relative_error: After it; the same without it.
        validation: Relative error on the held-out sequences before finetuning and after each epoch, with float32
            values; empty without held-out sequences or finetuning.
        best_epoch: Epoch whose parameters are kept, 0: those before finetuning.
        notes: Deviations worth telling.
        calibrate_s: Seconds for the dense layer's outputs and the Gram matrices.
        fit_s: Seconds for codes and codebooks.
        finetune_s: Seconds for block finetuning.
        finish_s: Seconds for measuring, writing, and the next layer's inputs.
    """

    name: str
    index: int
    total: int
    linear_error: float
    relative_error_before: float
    relative_error: float
    validation: tuple[float, ...]
    best_epoch: int
    notes: tuple[str, ...]
    calibrate_s: float
    fit_s: float
    finetune_s: float
    finish_s: float


@dataclass
class CalibrationReport:
    """What happened to the model.

    Attributes:
        layers: One report per decoder layer.
        kept: Linear -> why it stays in 16 bits.
        tokens: Tokens from which Gram matrices were made and on which layers were trained.
        held_out_tokens: Tokens of the last sequences, on which layers were judged only.
        notes: What concerns the whole run.
        device: Where it ran.
        compute_dtype: Type of the forward passes.
        resumed_at: Layer at which an interrupted run was taken up, 0 for a run from the start.
    """

    layers: list[BlockReport] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    held_out_tokens: int = 0
    notes: list[str] = field(default_factory=list)
    device: str = "cpu"
    compute_dtype: str = "bfloat16"
    resumed_at: int = 0
