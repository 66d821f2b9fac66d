"""What the engines page and its readers are told: engines, packages, environments, and the machine under them.

Versions come from the packages' metadata: nothing is imported. What takes longer (docker, disk use) is in functions of
its own.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

from backend.engines.environments import Environment
from backend.engines.registry import ENGINES, Engine
from backend.jobs.devices import driver_version, gpus
from backend.schema import ALGORITHMS
from backend.settings import Settings
from backend.tensorrt_llm.machine import executor_obstacles, installed_version

DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}
"""Packages whose distribution has another name."""
EVALUATION = ("lm_eval",)


@dataclass(frozen=True)
class EngineStatus:
    """One engine for one algorithm, as it stands on this machine.

    Attributes:
        algorithm: The job file's ALGORITHM.
        engine: The engine.
        reason: Why it cannot run here; None if it can.
        packages: Its packages with their versions, as `name version`; of an engine with an environment: empty.
    """

    algorithm: str
    engine: Engine
    reason: str | None
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """One way to run TensorRT-LLM.

    Attributes:
        name: For people.
        found: What is there; empty if it cannot be used.
        reasons: Why it cannot be used.
    """

    name: str
    found: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What the machine has beside Python packages.

    Attributes:
        driver: Version of the NVIDIA driver, or None.
        gpus: One line per GPU: name, memory, compute capability.
        places: Where TensorRT-LLM could run.
        sizes: Bytes on disk of installed environments, by name.
    """

    driver: str | None
    gpus: tuple[str, ...]
    places: tuple[Place, ...]
    sizes: dict[str, int]


def engine_rows() -> list[EngineStatus]:
    """Every algorithm with every engine that runs it."""
    return [
        EngineStatus(algorithm, engine, engine.unavailable_because(), tuple(map(versioned, engine.requires)))
        for algorithm in ALGORITHMS
        for engine in ENGINES
        if algorithm in engine.algorithms
    ]


def versioned(package: str) -> str:
    """A package of Quantdeck's own environment with its version, or that it is not installed."""
    try:
        return f"{package} {metadata.version(DISTRIBUTIONS.get(package, package))}"
    except metadata.PackageNotFoundError:
        return f"{package} (not installed)"


def own_packages() -> list[str]:
    """Python and the packages of Quantdeck's own environment that any engine, or the evaluation, needs."""
    names = dict.fromkeys(name for engine in ENGINES for name in engine.requires)
    return [f"Python {sys.version.split()[0]}", *(versioned(name) for name in (*names, *EVALUATION))]


def main_packages(env: Environment) -> list[str]:
    """Of an installed environment the packages that its definition asks for by name; empty if it is not installed."""
    facts = env.ready()
    asked = {_plain(line) for line in _asked_lines(env)}
    return [package for package in (facts or {}).get("packages", []) if _plain(package) in asked]


def _asked_lines(env: Environment) -> list[str]:
    found = []
    for name in ("requirements.in", "torch.txt", "source.txt"):
        path = env.definition / name
        found += path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in found if line.strip() and not line.lstrip().startswith(("#", "-"))]


def _plain(requirement: str) -> str:
    """The name of a requirement, spelt as all spellings of it are compared."""
    name = requirement.strip()
    for end in "=<>~! [;@\\":
        name = name.split(end)[0]
    return name.lower().replace("_", "-").replace(".", "-")


def machine(settings: Settings, installed: list[Environment]) -> Machine:
    """GPUs, driver, where TensorRT-LLM could run, and disk use. Takes seconds where docker is slow to answer.

    Args:
        settings: The home's settings.
        installed: Environments whose size is wanted.
    """
    run = settings.tensorrt_llm
    folder = Path(run.environment) if run.environment else None
    version = installed_version(folder) if folder else None
    told = (
        ("environment", f"{folder}, TensorRT-LLM {version or 'of unknown version'}"),
        ("docker", f"image {run.image}"),
    )
    places = []
    for executor, found in told:
        reasons = tuple(obstacle.message for obstacle in executor_obstacles(executor, run))
        places.append(Place(executor, "" if reasons else found, reasons))
    shown = tuple(
        f"GPU {gpu.index}: {gpu.name}, {gpu.total_bytes / 1e9:.0f} GB"
        + (f", compute capability {gpu.capability[0]}.{gpu.capability[1]}" if gpu.capability else "")
        for gpu in gpus()
    )
    sizes = {env.name: disk_bytes(env.folder) for env in installed if env.ready()}
    return Machine(driver_version(), shown, tuple(places), sizes)


@lru_cache(maxsize=32)
def disk_bytes(folder: Path) -> int:
    """Bytes that a finished environment takes on disk; counted once, since it does not change.

    Files that uv links from its cache count as well: they stay when the cache is cleared.
    """
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            total += os.lstat(os.path.join(parent, name)).st_blocks * 512
    return total
