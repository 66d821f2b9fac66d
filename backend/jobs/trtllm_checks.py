"""What a TensorRT-LLM job asks of the model and of the machine, told before it starts. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from backend.engines.configurations import configurations
from backend.engines.trtllm_handover import plan_of
from backend.engines.trtllm_plan import fields_of
from backend.errors import ConfigError, ConfigErrors
from backend.jobs.devices import gpu_numbers
from backend.paths import Home
from backend.schema import JobConfig, TensorRTLLMSettings
from backend.settings import Settings
from backend.sources.quick_check import QuickFacts
from backend.tensorrt_llm.fit import SECTION
from backend.tensorrt_llm.machine import obstacles
from backend.tensorrt_llm.methods import METHODS

NO_GPU = (
    "Building and running in TensorRT-LLM needs an NVIDIA GPU, and there is none here: the job quantizes, exports and "
    "measures, and hands over the commands that do the rest elsewhere."
)


def check_device(config: JobConfig, device: str) -> None:
    """Refuse methods that cannot even be quantized without a GPU.

    Raises:
        ConfigErrors: With what would work.
    """
    settings = config.algorithm_settings
    if not isinstance(settings, TensorRTLLMSettings) or device != "cpu":
        return
    if lacking := [name for name in settings.methods if METHODS[name].needs_cuda]:
        others = ", ".join(name for name, method in METHODS.items() if not method.needs_cuda)
        message = f"found {lacking[0]}, which needs an NVIDIA GPU to quantize too, and there is none; choose {others}"
        raise ConfigErrors([ConfigError(message, key=f"{SECTION}.quant_method", value=lacking[0])])


def run_notes(config: JobConfig, facts: QuickFacts, home: Home, model: Path, device: str) -> list[str]:
    """What of the job will not be possible on this machine, and why."""
    settings = config.algorithm_settings
    assert isinstance(settings, TensorRTLLMSettings)
    if not config.BENCHMARK.ENABLED:
        return []
    if device == "cpu":
        return [NO_GPU]
    found: dict[str, list[str]] = {}
    planned = configurations(config, device)
    for one in planned:
        fields = fields_of(config, one, facts.config, has_text=config.EVALUATION.needs_text)
        plan = plan_of(fields, model=model, folder=home.artefact_dir(config))
        for obstacle in obstacles(
            plan, Settings.load(home).tensorrt_llm, executor=settings.EXECUTOR, numbers=gpu_numbers(device)
        ):
            found.setdefault(obstacle.message, []).append(one.label)
    return [
        f"Running {'everything' if len(labels) == len(planned) else ', '.join(labels)} in TensorRT-LLM will not be "
        f"possible: {reason}. The job does the rest and hands over the commands."
        for reason, labels in found.items()
    ]
