"""Throughput and peak memory of two models: `python -m backend.evaluate.speed REQUEST.json RESULT.json`.

Each model lives in its own process, the same one that chat uses. Repetitions alternate between the two
(A B, B A, A B, ...), so that whatever else the machine does falls on both; prefill and decode are timed
apart, at batch 1. Where both models do not fit into memory together they are measured one after the other,
and the protocol says so. Nothing here is ever taken from a cache.

REQUEST: `{"baseline_dir", "quantized_dir", "device", "dtype", "prompt_tokens", "new_tokens", "warmup",
"repetitions", "threads", "seed", "stage", "configuration"}`, the last two for its events.
RESULT: `{"baseline": {"metrics": [...]}, "quantized": {"metrics": [...]}, "wall_s"}`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil

from backend.chat.client import ModelProcess
from backend.child import progress_of, run_child
from backend.errors import ConfigError
from backend.evaluate.metrics import Metric, versions
from backend.evaluate.stats import median_interval
from backend.event_stream import EventWriter, Progress
from backend.files import required
from backend.formats.remote_code import own_modules

SIDES = ("baseline", "quantized")
LOADING_FACTOR = 1.5
"""Loading may hold this multiple of the weight files for a moment: the file's pages and the packed copy."""


@dataclass(frozen=True)
class SpeedSettings:
    """How throughput is measured.

    Attributes:
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Compute dtype by name, None for the loader's default.
        prompt_tokens: Random tokens to prefill.
        new_tokens: Tokens to decode, one forward pass each.
        warmup: Repetitions per model that are thrown away.
        repetitions: Repetitions per model that count.
        threads: CPU threads per model, None for torch's choice.
        seed: Fixes the prompts; both models see the same ones.
    """

    device: str = "cpu"
    dtype: str | None = None
    prompt_tokens: int = 128
    new_tokens: int = 64
    warmup: int = 2
    repetitions: int = 7
    threads: int | None = None
    seed: int = 0

    @classmethod
    def from_request(cls, request: Mapping[str, Any]) -> Self:
        """The settings in a request, defaults where it has none.

        Raises:
            ConfigError: If a count is too small to measure anything.
        """
        settings = cls(**{key: request[key] for key in cls.__dataclass_fields__ if key in request})
        for key, least in (("prompt_tokens", 1), ("new_tokens", 1), ("warmup", 0), ("repetitions", 3)):
            value = getattr(settings, key)
            if value < least:
                raise ConfigError(f"{value} is too small; at least {least} is needed.", key=key, value=value)
        return settings


@dataclass
class Runs:
    """What was observed of one model: tokens/s per repetition, peak bytes."""

    prefill: list[float]
    decode: list[float]
    memory: dict[str, int]


def measure_speed(
    baseline_dir: Path, quantized_dir: Path, settings: SpeedSettings, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Measure both models.

    Returns:
        `{"baseline": {"metrics", "decode_path"}, "quantized": {...}}`: prefill and decode in tokens/s (median;
        samples are the repetitions), peak memory of loading and of running in bytes; how the model was run, in words.

    Raises:
        EngineError: If a model cannot be loaded or fails.
    """
    options = {"device": settings.device, "dtype": settings.dtype, "threads": settings.threads}
    models = {
        "baseline": ModelProcess(baseline_dir, code_modules=own_modules(), **options),  # type: ignore[arg-type]
        "quantized": ModelProcess(quantized_dir, code_modules=own_modules(), **options),  # type: ignore[arg-type]
    }
    runs = {side: Runs([], [], {}) for side in SIDES}
    total = 2 * (settings.warmup + settings.repetitions)
    done = 0

    def step(side: str, repetition: int) -> None:
        nonlocal done
        seed = settings.seed + repetition
        timing = models[side].benchmark(settings.prompt_tokens, settings.new_tokens, seed)
        if repetition >= settings.warmup:
            runs[side].prefill.append(settings.prompt_tokens / timing["prefill_s"])
            runs[side].decode.append(settings.new_tokens / timing["decode_s"])
        done += 1
        if on_progress:
            on_progress(done, total, f"speed of the {side} model")

    try:
        info = models["baseline"].start()
        together = fits_beside(quantized_dir, info)
        if together:
            models["quantized"].start()
            for repetition in range(settings.warmup + settings.repetitions):
                for side in SIDES if repetition % 2 == 0 else reversed(SIDES):
                    step(side, repetition)
        for side in SIDES:
            models[side].start()
            if not together:
                for repetition in range(settings.warmup + settings.repetitions):
                    step(side, repetition)
            runs[side].memory = models[side].memory()
            models[side].close()
    finally:
        for model in models.values():
            model.close()
    protocol = {
        "name": "speed",
        "batch": 1,
        "prompt_tokens": settings.prompt_tokens,
        "new_tokens": settings.new_tokens,
        "warmup": settings.warmup,
        "repetitions": settings.repetitions,
        "order": "alternating, both models loaded" if together else "one model after the other (memory)",
        "threads": info["threads"],
        "device": settings.device,
        "device_name": info["device_name"],
        "dtype": info["dtype"],
        "seed": settings.seed,
        "versions": versions("torch", "transformers"),
    }
    return {
        side: {"metrics": _metrics(runs[side], protocol), "decode_path": models[side].info["decode_path"]}
        for side in SIDES
    }


def fits_beside(model_dir: Path, info: Mapping[str, Any]) -> bool:
    """Whether a second model can be loaded while the first one stays.

    Args:
        model_dir: Folder of the second model.
        info: What the first model's process said when it was ready.
    """
    weights = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
    free = info.get("device_free_bytes")
    if free is None:
        free = psutil.virtual_memory().available
    return weights * LOADING_FACTOR < free


def _metrics(runs: Runs, protocol: dict[str, Any]) -> list[Metric]:
    where = f"batch 1, {protocol['threads']} threads, {protocol['dtype']}, {protocol['device_name'] or 'cpu'}"
    metrics: list[Metric] = []
    for label, tokens, values in (
        ("Prefill", protocol["prompt_tokens"], runs.prefill),
        ("Decode", protocol["new_tokens"], runs.decode),
    ):
        low, high, confidence = median_interval(values)
        metrics.append(
            Metric(
                metric="tokens/s",
                name=f"{label} ({tokens} tokens)",
                value=median(values),
                stderr=None,
                unit="tokens/s",
                higher_is_better=True,
                protocol=protocol
                | {
                    "phase": label.lower(),
                    "statistic": "median",
                    "summary": f"{label.lower()} of {tokens} tokens"
                    + ("" if label == "Prefill" else f" after {protocol['prompt_tokens']}")
                    + f"; median of {len(values)} runs after {protocol['warmup']}, {protocol['order']}; {where}",
                },
                samples=values,
                spread={"low": low, "high": high, "confidence": confidence},
            )
        )
    measured = (
        "allocated by torch"
        if protocol["device"] != "cpu"
        else "resident memory above the same process without the model"
    )
    for label, key in (("loading", "load_peak_bytes"), ("running", "run_peak_bytes")):
        metrics.append(
            Metric(
                metric="peak memory",
                name=f"Peak memory, {label}",
                value=float(runs.memory[key]),
                stderr=None,
                unit="bytes",
                higher_is_better=False,
                protocol=protocol | {"phase": label, "statistic": "peak", "summary": f"{measured}, {label}; {where}"},
                samples=[],
            )
        )
    return metrics


def benchmark(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Time the two models of a request; returns the RESULT object."""
    started = time.monotonic()
    stage = str(request.get("stage", "benchmark"))
    result = measure_speed(
        Path(required(request, "baseline_dir")),
        Path(required(request, "quantized_dir")),
        SpeedSettings.from_request(request),
        progress_of(request, stage, events),
    )
    return result | {"wall_s": time.monotonic() - started}


if __name__ == "__main__":
    run_child(benchmark)
