"""AQLM's last stage: PV-tuning of the whole model against the one it was made from, into a checkpoint folder.

Run as `python -m backend.engines.aqlm_tune REQUEST.json RESULT.json` by a job's runner.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.child import run_child
from backend.errors import ConfigError
from backend.event_stream import EventWriter
from backend.quick_start import quick_import

if TYPE_CHECKING:
    from backend.quantize.aqlm.tune.report import StepReport, TuneReport

UNIT = "nats/token"
STAGES = {
    "teacher": "reading the base model's answers",
    "load": "loading the calibrated model",
    "tune": "tuning",
    "save": "writing the best model",
}


def tune(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Tune a calibrated model folder into another one.

    Args:
        request: `model_dir` (of the base model), `quantized_dir`, `tuning_file` (safetensors with `train` and
            `validation`), `out_dir`, `device` (torch's name), `processes`, `checkpoint_dir`, and `configuration` (see
            `backend.engines.aqlm_plan`).
        events: Takes progress events, one per step, with its losses.

    Returns:
        `curve` (per step `step`, `loss`, `changed`; per measurement `step`, `validation`), `before` and `after`
        (divergence on the validation text, nats per token), `best_step`, `steps`, `stopped`, `tokens`, `notes`.

    Raises:
        ConfigError: At the key of `llm.AQLM.finetune_config`.
    """
    wanted = request["configuration"]
    name = wanted["name"]
    events.note(stage="tune", message="loading", configuration=name)
    quick_import("backend.formats.writer", "backend.quantize.aqlm.tune.api")
    from safetensors.torch import load_file

    from backend.formats.writer import CheckpointWriter
    from backend.quantize.aqlm.tune.api import tune as run
    from backend.quantize.aqlm.tune.settings import TuneSettings

    out_dir, checkpoint_dir = Path(request["out_dir"]), Path(request["checkpoint_dir"])
    if not out_dir.is_dir():
        shutil.rmtree(checkpoint_dir, ignore_errors=True)  # progress of a result that is gone
    tokens = load_file(request["tuning_file"])
    model_dir, quantized_dir = Path(request["model_dir"]), Path(request["quantized_dir"])
    writer = CheckpointWriter(out_dir, model_dir, layout=wanted["layout"], dtype=wanted["dtype"])

    def on_stage(stage: str) -> None:
        events.note(stage="tune", message=STAGES[stage], configuration=name)

    def on_step(step: StepReport) -> None:
        events.note(
            stage="tune", step=step.step, total=step.total, configuration=name, unit=UNIT,
            loss=_number(step.loss), changed=step.changed, validation=_number(step.validation), message=_words(step),
        )  # fmt: skip

    try:
        report = run(
            model_dir, quantized_dir, tokens["train"], tokens["validation"], TuneSettings.from_dict(wanted["tune"]),
            writer, device=request["device"], checkpoint_dir=checkpoint_dir, processes=request["processes"],
            on_step=on_step, on_stage=on_stage,
        )  # fmt: skip
    except ConfigError as error:
        raise ConfigError(error.detail, key=f"llm.AQLM.finetune_config.{error.key}", value=error.value) from None
    writer.finish(report.kept)
    return {
        "curve": _curve(report),
        "before": report.before,
        "after": report.after,
        "best_step": report.best_step,
        "steps": report.steps,
        "stopped": report.stopped,
        "tokens": report.tokens,
        "validation_tokens": report.validation_tokens,
        "processes": report.processes,
        "resumed_at": report.resumed_at,
        "notes": _notes(report),
    }


def _number(value: float | None) -> float | None:
    """A number as JSON has it: none of NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None


def _words(step: StepReport) -> str:
    measured = f"validation {step.validation:.4g}, best {step.best:.4g} {UNIT}" if step.validation is not None else ""
    loss = f"divergence {step.loss:.4g} {UNIT}" if math.isfinite(step.loss) else ""
    return ", ".join(part for part in (loss, measured) if part)


def _curve(report: TuneReport) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {"step": i, "loss": _number(loss), "changed": changed}
        for i, (loss, changed) in enumerate(zip(report.losses, report.changed, strict=True), 1)
    ]
    return rows + [{"step": m.step, "validation": _number(m.divergence)} for m in report.validation]


def _notes(report: TuneReport) -> list[str]:
    told = f"tuning lowered the divergence on the validation text from {report.before:.4g} to {report.after:.4g} {UNIT}"
    when = f"; the model after step {report.best_step} of {report.steps} is kept"
    stopped = [f"tuning stopped early: {report.stopped}"] if report.stopped else []
    return [told + when, *stopped, *report.notes]


if __name__ == "__main__":
    run_child(tune)
