"""AQLM's first stage: codes, codebooks and block finetuning, layer by layer, into a checkpoint folder.

Run as `python -m backend.engines.aqlm_calibrate REQUEST.json RESULT.json` by a job's runner.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.child import run_child
from backend.engines.clock import Clock
from backend.event_stream import EventWriter
from backend.quick_start import quick_import

if TYPE_CHECKING:
    from backend.quantize.aqlm.report import BlockReport

UNIT = "relative output error"


def calibrate(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Quantize a model folder into one checkpoint folder.

    Args:
        request: `model_dir`, `tokens_file`, `out_dir`, `device` (torch's name), `checkpoint_dir`, `seed`, and
            `configuration` (see `backend.engines.aqlm_plan`).
        events: Takes progress events, one per decoder layer, with its errors.

    Returns:
        `timings` (per stage: `wall_s`, `cpu_s`; of `quantize` also what its parts took), `tokens`, `resumed_at`,
        `layers` (one report each), `skipped` (Linear: reason), `notes`.
    """
    clock = Clock()
    events.note(stage="calibrate", message="loading")
    quick_import("backend.formats.writer", "backend.quantize.aqlm.pipeline")
    import torch
    from safetensors.torch import load_file

    from backend.formats.writer import CheckpointWriter
    from backend.quantize.aqlm.finetune_settings import FinetuneSettings
    from backend.quantize.aqlm.pipeline import calibrate as run
    from backend.quantize.aqlm.presets import SearchSettings
    from backend.quantize.aqlm.scheme import AdditiveScheme

    model_dir, out_dir, wanted = Path(request["model_dir"]), Path(request["out_dir"]), request["configuration"]
    checkpoint_dir = Path(request["checkpoint_dir"])
    if not out_dir.is_dir():
        shutil.rmtree(checkpoint_dir, ignore_errors=True)  # progress of a result that is gone
    stored = load_file(request["tokens_file"])
    tokens, lengths = stored["tokens"], stored.get("lengths")
    writer = CheckpointWriter(out_dir, model_dir, layout=wanted["layout"], dtype=wanted["dtype"])
    timings = {"calibrate": clock.lap()}
    reports: list[BlockReport] = []

    def on_layer(layer: BlockReport) -> None:
        reports.append(layer)
        events.note(
            stage="quantize", step=layer.index + 1, total=layer.total, unit=UNIT, notes=list(layer.notes),
            configuration=wanted["name"], **_errors(layer),
        )  # fmt: skip

    events.note(stage="quantize", message=f"{len(tokens)} x {tokens.shape[1]} tokens")
    report = run(
        model_dir,
        tokens,
        AdditiveScheme(**wanted["scheme"]),
        SearchSettings.from_dict(wanted["search"]),
        FinetuneSettings.from_dict(wanted["finetune"]) if wanted["finetune"] else None,
        writer,
        val_size=wanted["val_size"],
        lengths=lengths,
        device=request["device"],
        dtype=getattr(torch, wanted["compute_dtype"]) if wanted["compute_dtype"] else None,
        checkpoint_dir=checkpoint_dir,
        workers=_workers(request["device"]),
        true_sequential=wanted["true_sequential"],
        seed=request["seed"],
        on_layer=on_layer,
    )
    parts = ("calibrate_s", "fit_s", "finetune_s", "finish_s")
    timings["quantize"] = clock.lap() | {part: round(sum(getattr(r, part) for r in reports), 3) for part in parts}
    events.note(stage="save", message="writing the last files")
    writer.finish(report.kept)
    timings["save"] = clock.lap()
    return {
        "timings": timings,
        "tokens": report.tokens,
        "held_out_tokens": report.held_out_tokens,
        "resumed_at": report.resumed_at,
        "layers": [_layer(layer) for layer in report.layers],
        "skipped": report.kept,
        "notes": [*report.notes, *(f"{r.name}: {note}" for r in report.layers for note in r.notes)],
    }


def _workers(device: str) -> int:
    """Processes that search codes: one per core that we may use; a GPU needs none."""
    return len(os.sched_getaffinity(0)) if device == "cpu" else 1


def _errors(layer: BlockReport) -> dict[str, Any]:
    return {
        "layer": layer.name,
        "error": layer.relative_error,
        "before_error": layer.relative_error_before,
        "linear_error": layer.linear_error,
    }


def _layer(layer: BlockReport) -> dict[str, Any]:
    finetuned = {"validation": list(layer.validation), "best_epoch": layer.best_epoch}
    return {**_errors(layer), **finetuned, "notes": list(layer.notes)}


if __name__ == "__main__":
    run_child(calibrate)
