"""Models that one program makes all at once: those of the core, of llm-compressor, of the autoawq package."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.engines.registry import engine_for
from backend.evaluate.cache import digest
from backend.evaluate.metrics import versions
from backend.jobs import models
from backend.jobs.devices import torch_device
from backend.jobs.models import Making
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.jobs.stage import Stage


def stages(run: Run) -> list[Stage]:
    """Quantize all configurations, then save them one by one."""
    made = makings(run)
    quantize = Stage(
        "quantize", "Quantize", _quantize, _note_quantize, quantize_key, _models_are_there, makes_models=True,
        writes=_models_to_write,
    )  # fmt: skip
    return [quantize, *(making.publish_stage() for making in made)]


def makings(run: Run) -> list[Making]:
    """How each of the models comes to be."""
    return [Making(c, quantize_key, partial(_told, configuration=c)) for c in run.configurations]


def _quantize(run: Run) -> Command:
    engine, key = engine_for(run.config), quantize_key(run)
    for making in makings(run):
        making.check_place(run)
    outputs = [models.staged(run, c) for c in run.configurations]
    models.prepare_folders(run, "quantize", key, outputs=outputs, checkpoint=run.checkpoint_dir)
    inputs = run.stage_result("download")
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(run.staging),
        "device": torch_device(run.job.device),
        "checkpoint_dir": str(run.checkpoint_dir),
        "seed": run.config.calibration.SEED,
        "configurations": [c.request for c in run.configurations],
    }
    command = run.program("quantize", engine.module, request)
    if engine.environment is None:
        return command
    return Command((str(engine.python()), *command.argv[1:]), engine.environment)


def quantize_key(run: Run) -> str:
    """Content key of all models that the program makes."""
    return digest(
        {
            "engine": run.configurations[0].engine,
            "configurations": [c.request for c in run.configurations],
            "seed": run.config.calibration.SEED,
            "device": run.job.device,
            "inputs": {k: v for k, v in run.stage_result("inputs").items() if k != "text"},
            "versions": versions("torch", "transformers", "llmcompressor"),
        }
    )


def _models_are_there(run: Run) -> bool:
    return all(making.is_there(run) for making in makings(run))


def _models_to_write(run: Run) -> tuple[Path, int]:
    return models.bytes_to_write(run, run.configurations)


def _note_quantize(run: Run) -> None:
    # The program times its own stages, which the runner can only see as one process.
    run.timings.pop("quantize", None)
    run.timings.update(run.stage_result("quantize")["timings"])


def _told(run: Run, configuration: Configuration) -> dict[str, Any]:
    quantized = run.stage_result("quantize")
    made = next(one for one in quantized["results"] if one["name"] == configuration.name)
    return {**made, "tokens": quantized["tokens"]}
