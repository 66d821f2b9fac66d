"""The stages of a job as people see them: their order, their words, and what in events and timings they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.engines.aqlm_plan import CALIBRATED, TUNED


@dataclass(frozen=True)
class ShownStage:
    """One line of a job's list of stages.

    Attributes:
        label: For people.
        names: What it is in events and timings: `stage`, or `stage.configuration`.
    """

    label: str
    names: tuple[str, ...]


_GET = ShownStage("Get model and text", ("download",))
_MEASURE = (
    ShownStage("Evaluate the baseline", ("evaluate_baseline",)),
    ShownStage("Evaluate the quantized model", ("evaluate_quantized",)),
    ShownStage("Compare the outputs of both", ("evaluate_fidelity",)),
    ShownStage("Benchmark both in turns", ("benchmark",)),
    ShownStage("Compare and report", ("report",)),
)
_QUANTIZE = (
    _GET,
    ShownStage("Calibrate", ("calibrate",)),
    ShownStage("Quantize layer by layer", ("quantize",)),
    ShownStage("Save the model", ("save", "publish")),
    *_MEASURE,
)
_BY_ALGORITHM: dict[str, tuple[ShownStage, ...]] = {
    "AQLM": (
        _GET,
        ShownStage("Load for calibration", ("calibrate",)),
        ShownStage("Find codes, finetune layer by layer", ("quantize", "save")),
        ShownStage("Check and save the calibrated model", (f"convert.{CALIBRATED}", f"publish.{CALIBRATED}")),
        ShownStage("Tune the whole model", ("publish_text", f"tune.{TUNED}")),
        ShownStage("Check and save the tuned model", (f"convert.{TUNED}", f"publish.{TUNED}")),
        *_MEASURE,
    ),
    "TensorRTLLM": (
        _GET,
        ShownStage("Quantize with nvidia-modelopt, export, read back", ("quantize", "calibrate", "save")),
        ShownStage("Save the model", ("publish",)),
        *(stage for stage in _MEASURE if stage.names not in (("benchmark",), ("report",))),
        ShownStage("Build and run in TensorRT-LLM", ("benchmark", "trtllm_build", "trtllm_bench", "trtllm_perplexity")),
        _MEASURE[-1],
    ),
}
_ALONE = ("convert", "publish")
"""Of a job that makes one model, what its stages are called without the configuration's name."""


def shown_stages(algorithm: str) -> tuple[ShownStage, ...]:
    """The stages of an algorithm's jobs, in the order of the work."""
    return _BY_ALGORITHM.get(algorithm, _QUANTIZE)


def index_of(algorithm: str, stage: str, configuration: str = "") -> int:
    """Place of an event's stage in `shown_stages`; -1 if it is none of them."""
    wanted = (f"{stage}.{configuration}", stage, f"{stage}.{CALIBRATED}" if stage in _ALONE else stage)
    shown = shown_stages(algorithm)
    return next((i for name in wanted for i, one in enumerate(shown) if name in one.names), -1)


def seconds(stage: ShownStage, timings: Mapping[str, Any]) -> float | None:
    """Wall seconds that a stage took; None if the timings of a job's result have none of it."""
    found = []
    for name in stage.names:
        base, _, configuration = name.partition(".")
        spent = timings.get(base) or {}
        if configuration and "configurations" in spent:
            spent = spent["configurations"].get(configuration) or {}
        elif configuration not in ("", CALIBRATED):
            continue
        if "wall_s" in spent:
            found.append(float(spent["wall_s"]))
    return sum(found) if found else None
