"""The quantize stages of Quantdeck's own core: any number of configurations from one calibration.

Run as `python -m backend.engines.native REQUEST.json RESULT.json` by a job's runner.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.engines.clock import Clock
from backend.event_stream import EventWriter
from backend.quick_start import quick_import

UNIT = "relative output error"


def quantize(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Quantize a model folder into one checkpoint folder per configuration.

    Args:
        request: `model_dir`, `tokens_file`, `out_dir`, `device` (torch's name), `checkpoint_dir`, and
            `configurations`, each with `name`, `recipe`, `layout` and `dtype`; one is written to `out_dir`/`name`.
        events: Takes progress events: one per decoder layer and configuration, with its errors.

    Returns:
        `timings` (per stage: `wall_s`, `cpu_s`), `tokens`, `resumed_at`, and `results`, per configuration `name`,
        `layers` (one report each), `skipped` (Linear: reason), `notes`.
    """
    clock = Clock()
    events.note(stage="calibrate", message="loading")
    quick_import("backend.formats.writer", "backend.quantize.pipeline")
    from safetensors.torch import load_file

    from backend.formats.writer import CheckpointWriter
    from backend.quantize.pipeline import quantize as run
    from backend.quantize.recipe import Recipe
    from backend.quantize.report import LayerReport

    model_dir, out_dir = Path(request["model_dir"]), Path(request["out_dir"])
    configurations = request["configurations"]
    checkpoint_dir = Path(request["checkpoint_dir"]) if request.get("checkpoint_dir") else None
    if checkpoint_dir and not all((out_dir / c["name"]).is_dir() for c in configurations):
        shutil.rmtree(checkpoint_dir, ignore_errors=True)  # progress of results that are gone
    stored = load_file(request["tokens_file"])
    tokens, lengths = stored["tokens"], stored.get("lengths")
    recipes = [Recipe.from_dict(c["recipe"]) for c in configurations]
    writers = [
        CheckpointWriter(
            out_dir / c["name"], model_dir, layout=c["layout"], dtype=c["dtype"], group_size=recipe.scheme.group_size
        )
        for c, recipe in zip(configurations, recipes, strict=True)
    ]
    timings = {"calibrate": clock.lap()}
    forward_s: dict[int, float] = {}

    def on_layer(layer: LayerReport) -> None:
        forward_s[layer.index] = layer.calibrate_s
        events.note(
            stage="quantize", step=layer.index + 1, total=layer.total, layer=layer.name, configuration=layer.recipe,
            error=layer.relative_error, rtn_error=layer.rtn_relative_error, unit=UNIT, notes=list(layer.notes),
        )  # fmt: skip

    events.note(stage="quantize", message=f"{len(tokens)} x {tokens.shape[1]} tokens")
    report = run(
        model_dir, tokens, recipes, writers, lengths=lengths, device=request["device"],
        checkpoint_dir=checkpoint_dir, on_layer=on_layer,
    )  # fmt: skip
    timings["quantize"] = clock.lap() | {"forward_s": round(sum(forward_s.values()), 3)}
    events.note(stage="save", message="writing the last files")
    for recipe, writer in zip(recipes, writers, strict=True):
        writer.finish(report.kept[recipe.name])
    timings["save"] = clock.lap()
    return {
        "timings": timings,
        "tokens": report.tokens,
        "resumed_at": report.resumed_at,
        "results": [
            {
                "name": recipe.name,
                "layers": [_layer(r) for r in report.layers if r.recipe == recipe.name],
                "skipped": report.kept[recipe.name],
                "notes": [f"{r.name}: {note}" for r in report.layers if r.recipe == recipe.name for note in r.notes],
            }
            for recipe in recipes
        ],
    }


def _layer(report: Any) -> dict[str, Any]:
    return {
        "layer": report.name,
        "error": report.relative_error,
        "rtn_error": report.rtn_relative_error,
        "notes": list(report.notes),
    }


if __name__ == "__main__":
    run_child(quantize)
