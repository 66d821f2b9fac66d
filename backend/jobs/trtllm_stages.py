"""How a TensorRT-LLM job's models come to be, and how they are run.

They are made one after the other: quantized, exported, read back, saved. A method that fails leaves the others of the
job alone. After everything else was measured, each is built and run in TensorRT-LLM, where this machine can; where it
cannot, the result tells why, and its folder has the script that does it elsewhere.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.engines.registry import engine_for
from backend.engines.trtllm_handover import SCRIPT, plan_of
from backend.engines.trtllm_plan import fields_of
from backend.evaluate.cache import digest
from backend.evaluate.metrics import versions
from backend.files import write_json
from backend.jobs import models
from backend.jobs.devices import describe_device, gpu_numbers, gpus, torch_device
from backend.jobs.measure import file_name, result_of
from backend.jobs.models import Making
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.jobs.stage import Stage
from backend.schema import TensorRTLLMSettings
from backend.settings import Settings
from backend.tensorrt_llm.fit import gpu_count
from backend.tensorrt_llm.machine import Obstacle, chosen_executor, obstacles
from backend.tensorrt_llm.plan import RunPlan

NAME, RUN_NAME = "quantize", "benchmark"
RUN_PROGRAM = "backend.engines.trtllm_run"
RESULT_FOLDER = "tensorrt_llm_result"
"""Folder, below the export, of the engine and the reports of a run."""


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


def run_stages(run: Run) -> list[Stage]:
    """The stages that run each model in TensorRT-LLM; in the place of the benchmark, which has no kernels for them."""
    return [
        Stage(
            RUN_NAME, "Run in TensorRT-LLM", partial(_run, configuration=one), partial(_note_run, configuration=one),
            partial(_run_key, configuration=one), partial(_has_run, configuration=one), configuration=one,
            may_fail=run.several,
        )
        for one in run.configurations
    ]  # fmt: skip


def makings(run: Run) -> list[Making]:
    """How each of the models comes to be."""
    return [
        Making(one, partial(quantize_key, configuration=one), partial(_told, configuration=one))
        for one in run.configurations
    ]


def quantize_key(run: Run, configuration: Configuration) -> str:
    """Content key of a configuration's model, with what goes along with it."""
    inputs = run.stage_result("inputs")
    return digest(
        {
            "engine": "modelopt",
            "configuration": configuration.request,
            "device": run.job.device,
            "inputs": {name: inputs[name] for name in ("model", "tokens", "text")},
            "plan": plan_values(run, configuration),
            "versions": versions("torch", "transformers", "nvidia-modelopt"),
        }
    )


def plan_values(run: Run, configuration: Configuration) -> dict[str, Any]:
    """A plan's fields without its folders."""
    inputs = run.stage_result("download")
    model = json.loads((Path(inputs["model_dir"]) / "config.json").read_text(encoding="utf-8"))
    return fields_of(run.config, configuration, model, has_text=bool(inputs["text_file"]))


def _settings(run: Run) -> TensorRTLLMSettings:
    settings = run.config.algorithm_settings
    assert isinstance(settings, TensorRTLLMSettings)
    return settings


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
        "handover": {
            "plan": plan_values(run, configuration),
            "text_file": inputs["text_file"],
            "image": Settings.load(run.home).tensorrt_llm.image,
        },
    }
    return run.program(file_name(NAME, configuration), engine.module, request)


def _to_write(run: Run, configuration: Configuration) -> tuple[Path, int]:
    return models.bytes_to_write(run, [configuration])


def _told(run: Run, configuration: Configuration) -> dict[str, Any]:
    return run.stage_result(file_name(NAME, configuration))


# -- running


def _plan(run: Run, configuration: Configuration) -> RunPlan:
    """The plan of a run here; reports and engine lie in the job's own folder, so that the export stays as published."""
    work = run.run_dir / "tensorrt_llm" / configuration.name
    model = Path(run.stage_result("download")["model_dir"])
    return plan_of(plan_values(run, configuration), model=model, folder=run.target(configuration), work=work)


def _obstacles(run: Run, configuration: Configuration) -> list[Obstacle]:
    return obstacles(
        _plan(run, configuration), Settings.load(run.home).tensorrt_llm, executor=_settings(run).EXECUTOR,
        numbers=gpu_numbers(run.job.device),
    )  # fmt: skip


def _run_key(run: Run, configuration: Configuration) -> str:
    settings = Settings.load(run.home).tensorrt_llm
    return digest(["run", quantize_key(run, configuration), settings.model_dump(), _settings(run).EXECUTOR])


def _has_run(run: Run, configuration: Configuration) -> bool:
    """Whether an earlier attempt could run it; what a machine lacked then it may have now."""
    return "obstacles" not in run.stage_result(file_name(RUN_NAME, configuration))


def _run(run: Run, configuration: Configuration) -> Command | None:
    """The program, or none if this machine cannot run it; the result then says why."""
    name = file_name(RUN_NAME, configuration)
    if blocked := _obstacles(run, configuration):
        told = [{"stages": list(one.stages), "reason": one.message} for one in blocked]
        write_json(run.result_file(name), {"obstacles": told})
        return None
    settings, plan = Settings.load(run.home).tensorrt_llm, _plan(run, configuration)
    numbers = gpu_numbers(run.job.device)
    request = {
        "plan": plan.to_json(),
        "inputs_dir": str(plan_of(plan_values(run, configuration), model=plan.model, folder=plan.checkpoint).work),
        "executor": chosen_executor(_settings(run).EXECUTOR, settings),
        "image": settings.image,
        "docker": settings.docker,
        "environment": settings.environment,
        "gpus": [gpu.uuid for gpu in gpus() if gpu.index in numbers],
        "job": f"quantdeck-{run.job.uid}-{configuration.name}",
        "configuration": configuration.name if run.several else None,
    }
    return run.program(name, RUN_PROGRAM, request)


def _note_run(run: Run, configuration: Configuration) -> None:
    """Save the engine and the reports beside the export, or tell in the job's own words what was not possible."""
    found = result_of(run, RUN_NAME, configuration) or {}
    if blocked := found.get("obstacles"):
        more = f" (and {len(blocked) - 1} more)" if len(blocked) > 1 else ""
        run.not_possible.setdefault(f"{blocked[0]['reason']}{more}", []).append(configuration.name)
        run.result["incomplete"] = _incomplete(run)
        return
    work, target = _plan(run, configuration).work, run.target(configuration) / RESULT_FOLDER
    for rest in ("bench", "engine_logits"):  # room of the programs, and an engine for perplexity alone
        shutil.rmtree(work / rest, ignore_errors=True)
    models.publish_folder(run, work, target, models.facts_of(run, _run_key(run, configuration)))


def told_of_run(run: Run, configuration: Configuration) -> dict[str, Any] | None:
    """What was measured in TensorRT-LLM, with the plan and the GPU it was measured on; None if nothing was asked."""
    found = result_of(run, RUN_NAME, configuration)
    if found is None or "obstacles" in found:
        return found
    plan, folder = plan_values(run, configuration), str(run.target(configuration) / RESULT_FOLDER)
    return {**found, "plan": plan, "device": describe_device(run.job.device), "folder": folder}


def _incomplete(run: Run) -> str:
    """That stages were not possible, why, and where the commands are that do them elsewhere."""
    every = [one.name for one in run.configurations]
    why = "; ".join(
        reason if names == every else f"{', '.join(names)}: {reason}" for reason, names in run.not_possible.items()
    )
    return (
        "Everything else is done, but building and running in TensorRT-LLM is not possible on this machine "
        f"({why}). The commands that do it elsewhere lie beside each model, in {SCRIPT}"
    )
