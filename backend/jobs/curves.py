"""What a job's events tell of its layers and of its tuning, for charts; of a resumed job the latest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def layers(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each decoder layer done so far.

    Returns:
        `configuration` (its name, empty if there is only one), `layer`, `error`, `rtn_error`, `before_error` (relative
        errors: of the result, of plain rounding, before finetuning), `unit` (of what: outputs, or weights) and `notes`,
        in the order of the first attempt.
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        if event.get("stage") == "quantize" and event.get("error") is not None and event.get("layer"):
            name, layer = str(event.get("configuration") or ""), str(event["layer"])
            errors = {key: event.get(key) for key in ("error", "rtn_error", "before_error", "unit")}
            found[name, layer] = {"configuration": name, "layer": layer, **errors, "notes": event.get("notes") or []}
    return list(found.values())


def steps(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each step of tuning done so far.

    Returns:
        `step`, `loss` (divergence on the step's own text) and `validation` (None where it was not measured), nats per
        token, in the order of the steps.
    """
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("stage") == "tune" and {"loss", "validation"} & event.keys():
            step = int(event["step"])
            found[step] = {"step": step, "loss": event.get("loss"), "validation": event.get("validation")}
    return [found[step] for step in sorted(found)]
