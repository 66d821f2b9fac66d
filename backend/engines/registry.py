"""The engines: which program quantizes for which `ALGORITHM`, and what it needs to run."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from backend.errors import EngineError


@dataclass(frozen=True)
class Engine:
    """One way to run an algorithm.

    Attributes:
        name: Name for people and for the command line.
        algorithm: The YAML's ALGORITHM.
        module: Program of its quantize stages, started with `python -m`.
        requires: Python packages that must be installed.
        about: One sentence.
    """

    name: str
    algorithm: str
    module: str
    requires: tuple[str, ...]
    about: str

    def unavailable_because(self) -> str | None:
        """Why it cannot run here, or None if it can. Looks the packages up without importing them."""
        missing = [package for package in self.requires if importlib.util.find_spec(package) is None]
        return f"not installed: {', '.join(missing)}; run `make setup`" if missing else None


ENGINES = (
    Engine(
        name="native",
        algorithm="AutoAWQ",
        module="backend.engines.native_awq",
        requires=("torch", "transformers", "safetensors"),
        about="Quantdeck's own streamed AWQ: one decoder layer in memory, search on Gram matrices.",
    ),
)


def engine_for(algorithm: str) -> Engine:
    """The engine that runs an algorithm.

    Raises:
        EngineError: If there is none, or it cannot run here.
    """
    engine = next((e for e in ENGINES if e.algorithm == algorithm), None)
    if engine is None:
        raise EngineError(f"no engine runs {algorithm}; there are {', '.join(e.algorithm for e in ENGINES)}")
    if reason := engine.unavailable_because():
        raise EngineError(f"engine {engine.name} for {algorithm} cannot run here: {reason}")
    return engine
