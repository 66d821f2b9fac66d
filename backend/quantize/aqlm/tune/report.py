"""What tuning tells while it runs and afterwards. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Measurement:
    """The model on the validation sequences.

    Attributes:
        step: Steps done before.
        divergence: Mean KL(base || model), nats per token.
    """

    step: int
    divergence: float


@dataclass(frozen=True)
class StepReport:
    """One step.

    Attributes:
        step: Its number, from 1; 0 for the measurement before the first.
        total: Steps in all.
        loss: Mean KL divergence on the step's own sequences before it, nats per token; NaN for step 0.
        changed: Part of all groups that got new codes.
        validation: Mean KL divergence on the validation sequences after it, nats per token; None: not measured.
        best: The lowest so far.
    """

    step: int
    total: int
    loss: float
    changed: float
    validation: float | None
    best: float


@dataclass(frozen=True)
class TuneReport:
    """How the tuning of a model went.

    Attributes:
        losses: Mean KL divergence of each step on its own sequences, nats per token.
        validation: Mean KL divergence on the validation sequences, first before the first step.
        changed: Part of all groups that got new codes, of each step.
        best_step: Steps after which the kept model was there; 0: the model that was given.
        steps: Steps done.
        stopped: Why it ended before its last step; None: it did not.
        kept: Linears of the decoder layers that are not quantized -> why; what a writer's `finish` needs.
        notes: Deviations worth telling.
        tokens: Training tokens of one epoch.
        validation_tokens: Of one measurement.
        device: Where it ran.
        amp_dtype: Type of the forward and backward passes.
        processes: That ran together.
        resumed_at: Step at which an interrupted run was taken up; 0: none was.
    """

    losses: tuple[float, ...]
    validation: tuple[Measurement, ...]
    changed: tuple[float, ...]
    best_step: int
    steps: int
    stopped: str | None
    kept: dict[str, str]
    notes: tuple[str, ...]
    tokens: int
    validation_tokens: int
    device: str
    amp_dtype: str
    processes: int
    resumed_at: int

    @property
    def before(self) -> float:
        """Mean KL divergence on the validation sequences before the first step."""
        return self.validation[0].divergence

    @property
    def after(self) -> float:
        """That of the kept model."""
        return min(m.divergence for m in self.validation)
