"""The engines: which program quantizes for which `ALGORITHM`, in which environment, and what it needs to run."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

from backend.engines.environments import environment_python, missing_reason
from backend.errors import EngineError
from backend.schema import JobConfig

NATIVE = "native"


@dataclass(frozen=True)
class Engine:
    """One way to run some algorithms.

    Attributes:
        name: Name for people, the command line and the YAML's ENGINE.
        algorithms: The YAML's ALGORITHMs that it can run.
        module: Program of its quantize stages, started with `python -m`; the first one, if there are several.
        requires: Python packages that must be installed beside Quantdeck; empty for an engine with its own.
        environment: Name of its own environment, or None if it runs in Quantdeck's.
        about: One sentence.
    """

    name: str
    algorithms: tuple[str, ...]
    module: str
    requires: tuple[str, ...]
    environment: str | None
    about: str

    def unavailable_because(self) -> str | None:
        """Why it cannot run here, or None if it can. Looks the packages up without importing them."""
        if self.environment is not None:
            return missing_reason(self.environment)
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(missing)}; run `make setup`" if missing else None

    def python(self) -> Path:
        """The interpreter that runs its program.

        Raises:
            EngineError: If its environment is not installed.
        """
        if self.environment is None:
            return Path(sys.executable)
        python = environment_python(self.environment)
        if python is None:
            raise EngineError(str(missing_reason(self.environment)))
        return python


ENGINES = (
    Engine(
        name=NATIVE,
        algorithms=("AutoAWQ", "Native", "LLMCompressor"),
        module="backend.engines.native",
        requires=("torch", "transformers", "safetensors"),
        environment=None,
        about="Quantdeck's own streamed RTN, AWQ and GPTQ: one decoder layer in memory, search on Gram matrices.",
    ),
    Engine(
        name=NATIVE,
        algorithms=("AQLM",),
        module="backend.engines.aqlm_calibrate",
        requires=("torch", "transformers", "safetensors", "accelerate", "aqlm", "numba"),
        environment=None,
        about="Quantdeck's own streamed AQLM and PV-tuning; results are read back by the aqlm package.",
    ),
    Engine(
        name="llmcompressor",
        algorithms=("LLMCompressor",),
        module="backend.engines.llm_compressor",
        requires=("torch", "transformers", "safetensors", "llmcompressor", "compressed_tensors"),
        environment=None,
        about="The llm-compressor package with all its recipes; holds the whole model in memory.",
    ),
    Engine(
        name="autoawq",
        algorithms=("AutoAWQ",),
        module="backend.engines.autoawq_package",
        requires=(),
        environment="autoawq",
        about="The original AutoAWQ package, in an environment of its own; takes CPU hours for what native does in "
        "minutes.",
    ),
    Engine(
        name="modelopt",
        algorithms=("TensorRTLLM",),
        module="backend.engines.modelopt_quantize",
        requires=("torch", "transformers", "safetensors", "modelopt", "requests"),
        environment=None,
        about="The nvidia-modelopt package, which quantizes for TensorRT-LLM; holds the whole model in memory.",
    ),
)


OF_ALGORITHM = {"TensorRTLLM": "modelopt"}
"""Algorithms with one engine, and not the core: their sections have no ENGINE."""


def engine_name(config: JobConfig) -> str:
    """The engine that a job file asks for: ENGINE of its algorithm's section, or the only one that there is."""
    return getattr(config.algorithm_settings, "ENGINE", OF_ALGORITHM.get(config.ALGORITHM, NATIVE))


def engine_for(job: JobConfig | tuple[str, str]) -> Engine:
    """The engine of a job file, or of an (algorithm, engine name) pair.

    Raises:
        EngineError: If there is none, or it cannot run here.
    """
    algorithm, name = (job.ALGORITHM, engine_name(job)) if isinstance(job, JobConfig) else job
    engine = next((e for e in ENGINES if e.name == name and algorithm in e.algorithms), None)
    if engine is None:
        pairs = ", ".join(f"{e.name} for {' and '.join(e.algorithms)}" for e in ENGINES)
        raise EngineError(f"no engine {name} runs {algorithm}; there are {pairs}")
    if reason := engine.unavailable_because():
        raise EngineError(f"engine {engine.name} for {algorithm} cannot run here: {reason}")
    return engine
