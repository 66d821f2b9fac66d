"""How a TensorRT-LLM job's models come to be: one after the other, each quantized, exported, read back and saved.

A method that fails leaves the others of the job alone.
"""

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
from backend.jobs.measure import file_name
from backend.jobs.models import Making
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.jobs.stage import Stage
from backend.tensorrt_llm.fit import gpu_count

NAME = "quantize"


def stages(run: Run) -> list[Stage]:
    """The stages that make and save each model."""
    made = []
    for making in makings(run):
        made.append(
            Stage(
                NAME, "Quantize", partial(_quantize, making=making), key=making.key, intact=making.is_there,
                configuration=making.configuration, makes_models=True, may_fail=run.several,
                writes=partial(_to_write, configuration=making.configuration),
            )
        )  # fmt: skip
        made.append(making.publish_stage(may_fail=run.several))
    return made


def makings(run: Run) -> list[Making]:
    """How each of the models comes to be."""
    return [
        Making(one, partial(quantize_key, configuration=one), partial(_told, configuration=one))
        for one in run.configurations
    ]


def quantize_key(run: Run, configuration: Configuration) -> str:
    """Content key of a configuration's model."""
    inputs = run.stage_result("inputs")
    return digest(
        {
            "engine": "modelopt",
            "configuration": configuration.request,
            "gpus": gpu_count(run.config),
            "device": run.job.device,
            "inputs": {name: inputs[name] for name in ("model", "tokens")},
            "versions": versions("torch", "transformers", "nvidia-modelopt"),
        }
    )


def _quantize(run: Run, making: Making) -> Command:
    engine, configuration = engine_for(run.config), making.configuration
    making.check_place(run)
    inputs = run.stage_result("download")
    run.staging.mkdir(parents=True, exist_ok=True)
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(models.staged(run, configuration)),
        "device": torch_device(run.job.device),
        "configuration": {**configuration.request, "tp_size": gpu_count(run.config)},
    }
    return run.program(file_name(NAME, configuration), engine.module, request)


def _to_write(run: Run, configuration: Configuration) -> tuple[Path, int]:
    return models.bytes_to_write(run, [configuration])


def _told(run: Run, configuration: Configuration) -> dict[str, Any]:
    return run.stage_result(file_name(NAME, configuration))
