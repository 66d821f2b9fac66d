"""The quantize stages of `ALGORITHM: AutoAWQ` with Quantdeck's own core.

Run as `python -m backend.engines.native_awq REQUEST.json RESULT.json` by a job's runner.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from backend.child import run_child
from backend.event_stream import EventWriter


def quantize(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Quantize a model folder into an AutoAWQ checkpoint folder.

    Args:
        request: `model_dir`, `tokens_file`, `out_dir`, `device` (torch's name), `settings` (the YAML section).
        events: Takes progress events: one per decoder layer, with its errors.

    Returns:
        `timings` (per stage: `wall_s`, `cpu_s`), `layers` (one report each), `skipped` (Linear: reason), `tokens`.
    """
    began = _Clock()
    events.note(stage="calibrate", message="loading")
    from safetensors.torch import load_file

    from backend.formats.writer import CheckpointWriter
    from backend.quantize import AwqSettings, LayerReport, quantize_awq

    settings = request["settings"]
    awq = AwqSettings(bits=settings["W_BIT"], group_size=settings["Q_GROUP_SIZE"], zero_point=settings["ZERO_POINT"])
    tokens = load_file(request["tokens_file"])["tokens"]
    writer = CheckpointWriter(
        Path(request["out_dir"]), Path(request["model_dir"]), version=settings["VERSION"], dtype=settings["dtype"]
    )
    timings = {"calibrate": began.lap()}
    calibrate_s = 0.0

    def on_layer(layer: LayerReport) -> None:
        nonlocal calibrate_s
        calibrate_s += layer.calibrate_s
        events.note(
            stage="quantize", step=layer.index + 1, total=layer.total, layer=layer.name, error=layer.relative_error,
            rtn_error=layer.rtn_relative_error, unit="relative output error", notes=list(layer.notes),
        )  # fmt: skip

    events.note(stage="quantize", message=f"{len(tokens)} x {tokens.shape[1]} tokens")
    report = quantize_awq(Path(request["model_dir"]), tokens, awq, writer, device=request["device"], on_layer=on_layer)
    timings["quantize"] = began.lap()
    timings["quantize"]["forward_s"] = round(calibrate_s, 3)
    events.note(stage="save", message="writing the last files")
    writer.finish()
    timings["save"] = began.lap()
    return {
        "timings": timings,
        "layers": [
            {"layer": r.name, "error": r.relative_error, "rtn_error": r.rtn_relative_error, "notes": list(r.notes)}
            for r in report.layers
        ],
        "skipped": report.skipped,
        "tokens": report.tokens,
    }


class _Clock:
    """Wall and CPU seconds since the last lap; the first lap counts from the process's own start."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), 0.0

    def lap(self) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        spent = {"wall_s": round(wall - self._wall, 3), "cpu_s": round(cpu - self._cpu, 3)}
        self._wall, self._cpu = wall, cpu
        return spent


if __name__ == "__main__":
    run_child(quantize)
