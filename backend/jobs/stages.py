"""The stages of a job, in order, and what each needs from the ones before.

A stage either starts a program (its request and result are JSON files in the run folder) or is done by the
runner itself. The artefact is published before anything is measured, so nothing that fails later can lose it.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backend.engines.registry import engine_for
from backend.evaluate import cache
from backend.evaluate.report import build_rows, format_table
from backend.files import write_json
from backend.formats.size import weight_bytes
from backend.jobs.devices import describe_device, torch_device
from backend.jobs.publish import publish
from backend.jobs.store import Job
from backend.paths import Home
from backend.schema import JobConfig
from backend.sources.plan import evaluation_tasks

CONFIG_FILE = "quantdeck.yaml"
PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "safetensors")


@dataclass
class Run:
    """What the stages of one job know and make.

    Attributes:
        timings: Per stage `wall_s` and `cpu_s`, seconds.
        peak_rss_bytes: Largest resident memory of any stage's process.
        artefact: Folder of the published model, once it is.
        result: What `Job.result` becomes.
    """

    home: Home
    job: Job
    config: JobConfig
    run_dir: Path
    stage: str = "start"
    timings: dict[str, dict[str, float]] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    artefact: Path | None = None
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def staging(self) -> Path:
        """Where the quantize stage writes before publication."""
        return self.run_dir / "out.tmp"

    def stage_result(self, name: str) -> dict[str, Any]:
        """What a finished stage left."""
        return json.loads((self.run_dir / "results" / f"{name}.json").read_text(encoding="utf-8"))

    def program(self, name: str, module: str, request: dict[str, Any]) -> list[str]:
        """Write a stage's request and return the command that serves it."""
        request_file = self.run_dir / "requests" / f"{name}.json"
        result_file = self.run_dir / "results" / f"{name}.json"
        write_json(request_file, request)
        result_file.parent.mkdir(parents=True, exist_ok=True)
        return [sys.executable, "-m", module, str(request_file), str(result_file)]

    def note_usage(self, name: str, wall_s: float, usage: Any) -> None:
        """Record a stage program's cost, as the kernel counted it (`resource.struct_rusage`, RSS in KiB)."""
        self.timings[name] = {"wall_s": round(wall_s, 3), "cpu_s": round(usage.ru_utime + usage.ru_stime, 3)}
        self.peak_rss_bytes = max(self.peak_rss_bytes, usage.ru_maxrss * 1024)


def _nothing(run: Run) -> None:
    """For stages whose program leaves nothing to do."""


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
        name: Name in events, timings and file names.
        label: Name for people.
        command: The program to start, or None if `finish` does the work (or there is none to do).
        finish: Done by the runner after the program has ended well.
        is_needed: Whether this job has the stage.
    """

    name: str
    label: str
    command: Callable[[Run], list[str] | None]
    finish: Callable[[Run], None] = _nothing
    is_needed: Callable[[Run], bool] = lambda run: True


def _download(run: Run) -> list[str]:
    request = {"home": str(run.home.root), "config": run.job.config_yaml, "out": str(run.run_dir / "inputs")}
    return run.program("download", "backend.sources.prepare", request)


def _quantize(run: Run) -> list[str]:
    inputs = run.stage_result("download")
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(run.staging),
        "device": torch_device(run.job.device),
        "settings": run.config.algorithm_settings.model_dump(),
    }
    return run.program("quantize", engine_for(run.job.algorithm).module, request)


def _note_quantize(run: Run) -> None:
    # The program times its own stages, which the runner can only see as one process.
    run.timings.pop("quantize", None)
    run.timings.update(run.stage_result("quantize")["timings"])


def _publish(run: Run) -> None:
    inputs, quantized = run.stage_result("download"), run.stage_result("quantize")
    target = run.home.artefact_dir(run.config)
    (run.staging / CONFIG_FILE).write_text(run.job.config_yaml, encoding="utf-8")
    facts = {
        "job": run.job.uid,
        "job_id": run.job.job_id,
        "model": run.job.model,
        "model_commit": inputs["model_commit"],
        "algorithm": run.job.algorithm,
        "calibration": {"sequences": inputs["samples"], "tokens": quantized["tokens"]},
        "device": describe_device(run.job.device),
        "versions": _versions(),
    }
    manifest = publish(run.staging, target, facts)
    run.artefact = target
    run.result.update(
        artefact=str(target), model_dir=inputs["model_dir"], manifest=manifest, layers=quantized["layers"],
        skipped=quantized["skipped"], device=facts["device"], versions=facts["versions"],
        samples=inputs["samples"], samples_wanted=inputs["samples_wanted"],
    )  # fmt: skip


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _evaluates(run: Run) -> bool:
    settings = run.config.EVALUATION
    return settings.ENABLED and bool(settings.PROTOCOLS or evaluation_tasks(run.config))


def evaluation_request(run: Run, stage: str, model_dir: str) -> dict[str, Any]:
    """What the evaluation program is asked for; the same for baseline and artefact but for the folder."""
    settings, inputs = run.config.EVALUATION, run.stage_result("download")
    return {
        "model_dir": model_dir,
        "device": torch_device(run.job.device),
        "dtype": None,
        "perplexity": {
            "text_file": inputs["text_file"],
            "text_name": inputs["text_name"],
            "protocols": settings.PROTOCOLS,
            "window": settings.WINDOW,
            "max_windows": settings.MAX_WINDOWS,
        },
        "tasks": [
            {"name": t.NAME, "num_fewshot": t.NUM_FEWSHOT, "limit": t.LIMIT} for t in evaluation_tasks(run.config)
        ],
        "batch_size": settings.BATCH_SIZE,
        "seed": run.config.CALIBRATION.SEED,
        "stage": stage,
    }


def _evaluate_baseline(run: Run) -> list[str] | None:
    request = evaluation_request(run, "evaluate_baseline", run.stage_result("download")["model_dir"])
    cached = cache.lookup(run.home.evaluation_cache(), cache.evaluation_key(request))
    if cached is not None:
        write_json(run.run_dir / "results" / "evaluate_baseline.json", cached)
        return None
    return run.program("evaluate_baseline", "backend.evaluate.worker", request)


def _keep_baseline(run: Run) -> None:
    request = evaluation_request(run, "evaluate_baseline", run.stage_result("download")["model_dir"])
    result = run.stage_result("evaluate_baseline")
    if not result.get("cached"):
        cache.store(run.home.evaluation_cache(), cache.evaluation_key(request), result)


def _evaluate_quantized(run: Run) -> list[str]:
    request = evaluation_request(run, "evaluate_quantized", str(run.artefact))
    return run.program("evaluate_quantized", "backend.evaluate.worker", request)


def _benchmark(run: Run) -> list[str]:
    settings = run.config.BENCHMARK
    request = {
        "baseline_dir": run.stage_result("download")["model_dir"],
        "quantized_dir": str(run.artefact),
        "device": torch_device(run.job.device),
        "prompt_tokens": settings.PROMPT_TOKENS,
        "new_tokens": settings.NEW_TOKENS,
        "warmup": settings.WARMUP,
        "repetitions": settings.REPETITIONS,
        "seed": run.config.CALIBRATION.SEED,
        "stage": "benchmark",
    }
    return run.program("benchmark", "backend.evaluate.speed", request)


def _report(run: Run) -> None:
    inputs = run.stage_result("download")
    nothing: dict[str, Any] = {"metrics": []}
    rows = build_rows(
        run.stage_result("evaluate_baseline") if _evaluates(run) else nothing,
        run.stage_result("evaluate_quantized") if _evaluates(run) else nothing,
        baseline_bytes=weight_bytes(inputs["model_dir"]),
        quantized_bytes=weight_bytes(run.result["artefact"]),
        speed=run.stage_result("benchmark") if run.config.BENCHMARK.ENABLED else None,
    )
    run.result.update(
        rows=rows,
        table=format_table(rows, run.job.model),
        timings=run.timings,
        peak_rss_bytes=run.peak_rss_bytes,
    )
    write_json(run.run_dir / "report.json", run.result)


STAGES = (
    Stage("download", "Load model and text", _download),
    Stage("quantize", "Quantize", _quantize, _note_quantize),
    Stage("publish", "Save", lambda run: None, _publish),
    Stage("evaluate_baseline", "Evaluate baseline", _evaluate_baseline, _keep_baseline, _evaluates),
    Stage("evaluate_quantized", "Evaluate quantized", _evaluate_quantized, is_needed=_evaluates),
    Stage("benchmark", "Benchmark", _benchmark, is_needed=lambda run: run.config.BENCHMARK.ENABLED),
    Stage("report", "Report", lambda run: None, _report),
)
