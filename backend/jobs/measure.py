"""The stages that measure: the baseline once, every quantized model, and both against each other in turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.evaluate import cache
from backend.evaluate.metrics import versions
from backend.files import write_json
from backend.jobs.devices import torch_device
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.sources.plan import evaluation_tasks

WORKER = "backend.evaluate.worker"
FIDELITY = "backend.evaluate.fidelity"
SPEED = "backend.evaluate.speed"


def file_name(stage: str, configuration: Configuration | None) -> str:
    """Name of a stage's files: the stage's, with the configuration's if it is about one."""
    return f"{stage}.{configuration.name}" if configuration else stage


def result_of(run: Run, stage: str, configuration: Configuration) -> dict[str, Any] | None:
    """What was measured of a configuration; None if the job does not measure it or that failed."""
    name = file_name(stage, configuration)
    return run.stage_result(name) if run.result_file(name).exists() else None


def evaluates(run: Run) -> bool:
    """Whether the job measures perplexity or accuracy."""
    settings = run.config.EVALUATION
    return settings.ENABLED and bool(settings.PROTOCOLS or evaluation_tasks(run.config))


def _request(run: Run, stage: str, model_dir: str) -> dict[str, Any]:
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
        }
        if settings.PROTOCOLS
        else None,
        "tasks": [
            {"name": t.NAME, "num_fewshot": t.NUM_FEWSHOT, "limit": t.LIMIT} for t in evaluation_tasks(run.config)
        ],
        "batch_size": settings.BATCH_SIZE,
        "seed": run.config.calibration.SEED,
        "stage": stage,
    }


def _named(run: Run, request: dict[str, Any], configuration: Configuration) -> dict[str, Any]:
    """The request with the configuration's name, which its events then carry, if there are several."""
    return {**request, "configuration": configuration.name} if run.several else request


def _baseline_request(run: Run) -> dict[str, Any]:
    return _request(run, "evaluate_baseline", run.stage_result("download")["model_dir"])


def baseline_key(run: Run) -> str:
    """Content key of the baseline's evaluation."""
    return cache.evaluation_key(_baseline_request(run))


def evaluate_baseline(run: Run) -> Command | None:
    """The program, or none if the same baseline was measured in the same way before and need not be again."""
    cached = None if run.keeps_models else cache.lookup(run.home.evaluation_cache(), baseline_key(run))
    if cached is not None:
        write_json(run.result_file("evaluate_baseline"), cached)
        return None
    return run.program("evaluate_baseline", WORKER, _baseline_request(run))


def keep_baseline(run: Run) -> None:
    """Store the measured baseline for other jobs."""
    result = run.stage_result("evaluate_baseline")
    if not result.get("cached"):
        cache.store(run.home.evaluation_cache(), baseline_key(run), result)


def _quantized_request(run: Run, configuration: Configuration) -> dict[str, Any]:
    request = _request(run, "evaluate_quantized", str(run.target(configuration)))
    return _named(run, request, configuration)


def _evaluate_quantized(run: Run, configuration: Configuration) -> Command:
    name = file_name("evaluate_quantized", configuration)
    return run.program(name, WORKER, _quantized_request(run, configuration))


def _quantized_key(run: Run, configuration: Configuration) -> str:
    return cache.evaluation_key(_quantized_request(run, configuration))


def _fidelity_request(run: Run, configuration: Configuration) -> dict[str, Any]:
    settings, inputs = run.config.EVALUATION, run.stage_result("download")
    request = {
        "baseline_dir": inputs["model_dir"],
        "quantized_dir": str(run.target(configuration)),
        "base": {"name": run.job.model, "sha256": cache.model_fingerprint(Path(inputs["model_dir"]))},
        "device": torch_device(run.job.device),
        "dtype": None,
        "text_file": inputs["text_file"],
        "text_name": inputs["text_name"],
        "window": settings.WINDOW,
        "max_windows": settings.MAX_WINDOWS,
        "windows": settings.FIDELITY_WINDOWS,
        "batch_size": settings.BATCH_SIZE,
        "spool_dir": str(run.run_dir),
        "stage": "evaluate_fidelity",
    }
    return _named(run, request, configuration)


def _fidelity(run: Run, configuration: Configuration) -> Command:
    name = file_name("evaluate_fidelity", configuration)
    return run.program(name, FIDELITY, _fidelity_request(run, configuration))


def _fidelity_key(run: Run, configuration: Configuration) -> str:
    request = _fidelity_request(run, configuration)
    models = [request["base"]["sha256"], cache.model_fingerprint(Path(request["quantized_dir"]))]
    text = cache.file_digest(Path(request["text_file"]))
    return cache.digest([request, models, text, versions("torch", "transformers", "tokenizers")])


def _benchmark_request(run: Run, configuration: Configuration) -> dict[str, Any]:
    settings = run.config.BENCHMARK
    request = {
        "baseline_dir": run.stage_result("download")["model_dir"],
        "quantized_dir": str(run.target(configuration)),
        "device": torch_device(run.job.device),
        "prompt_tokens": settings.PROMPT_TOKENS,
        "new_tokens": settings.NEW_TOKENS,
        "warmup": settings.WARMUP,
        "repetitions": settings.REPETITIONS,
        "seed": run.config.calibration.SEED,
        "stage": "benchmark",
    }
    return _named(run, request, configuration)


def _benchmark(run: Run, configuration: Configuration) -> Command:
    return run.program(file_name("benchmark", configuration), SPEED, _benchmark_request(run, configuration))


def _benchmark_key(run: Run, configuration: Configuration) -> str:
    request = _benchmark_request(run, configuration)
    models = [cache.model_fingerprint(Path(request[side])) for side in ("baseline_dir", "quantized_dir")]
    return cache.digest([request, models, versions("torch", "transformers")])


PROGRAMS = {
    "evaluate_quantized": (_evaluate_quantized, _quantized_key),
    "evaluate_fidelity": (_fidelity, _fidelity_key),
    "benchmark": (_benchmark, _benchmark_key),
}
