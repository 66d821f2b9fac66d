"""Whether this machine can run a plan, found without torch: each obstacle with what was found, needed and to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.disk import free_bytes
from backend.jobs.devices import Gpu, driver_version, gpus
from backend.settings import TensorRTLLMRunSettings
from backend.tensorrt_llm.flags import TABLES
from backend.tensorrt_llm.methods import AMPERE, ENGINE, LEGACY_VERSION, METHODS
from backend.tensorrt_llm.plan import RunPlan

BUILD, BENCH, PERPLEXITY = "build", "bench", "perplexity"
DRIVER, COMPATIBLE_DRIVER = 580, 535
"""The driver of CUDA 13, which the image has; data-centre GPUs run it on older ones through forward compatibility."""
ROOM = 1.2
"""GPU memory for weights and what the programs need beside them, in weight bytes; the KV cache takes what is left."""
ENGINE_ROOM = 1.1
ASK_S = 20.0
TOOLKIT = ("nvidia-container-runtime-hook", "nvidia-container-cli", "nvidia-ctk")


@dataclass(frozen=True)
class Obstacle:
    """One reason why stages of a run are not possible here.

    Attributes:
        stages: Which of `build`, `bench`, `perplexity` it stops.
        found: What is there.
        needed: What would have to be.
        action: What to do.
    """

    stages: tuple[str, ...]
    found: str
    needed: str
    action: str

    @property
    def message(self) -> str:
        """All of it in one line."""
        return f"found {self.found}; {self.needed}; {self.action}"


def obstacles(
    plan: RunPlan,
    settings: TensorRTLLMRunSettings,
    *,
    executor: str = "auto",
    numbers: Sequence[int] = (0,),
    weight_bytes: int | None = None,
) -> list[Obstacle]:
    """Everything that keeps a plan from running here; empty if nothing does.

    Args:
        plan: The run.
        settings: Where TensorRT-LLM is.
        executor: `auto`, `environment`, `docker` or `none`, as the job asks.
        numbers: Indices of the GPUs of the job.
        weight_bytes: Bytes of the largest weights that are loaded; by default those of the plan's folders, and
            memory and disk are not judged if there are none yet.
    """
    all_stages = stages(plan)
    if executor == "none":
        why = "EXECUTOR none, which runs nothing"
        return [Obstacle(all_stages, why, "one of environment, docker or auto would run it", "change EXECUTOR")]
    if weight_bytes is None:
        weight_bytes = max((stored_bytes(folder) for folder in (plan.model, plan.checkpoint)), default=0)
    found = _gpu_obstacles(plan, all_stages, numbers, weight_bytes)
    if chosen_executor(executor, settings) == "environment":
        found += _environment_obstacles(settings, all_stages, builds=plan.mode == ENGINE)
    else:
        found += _docker_obstacles(settings, all_stages)
    free, wanted = free_bytes(plan.engine), int(weight_bytes * ENGINE_ROOM)
    if plan.mode == ENGINE and free < wanted:
        found.append(
            Obstacle(
                all_stages, f"{_gb(free)} free on the disk of {plan.engine}", f"the engine takes about {_gb(wanted)}",
                "free some space",
            )
        )  # fmt: skip
    return found


def executor_obstacles(executor: str, settings: TensorRTLLMRunSettings) -> list[Obstacle]:
    """What keeps `environment` or `docker` from running anything here, whatever the job; asks docker's daemon."""
    everything = (BUILD, BENCH, PERPLEXITY)
    if executor == "environment":
        return _environment_obstacles(settings, everything, builds=True)
    return _docker_obstacles(settings, everything)


def stages(plan: RunPlan) -> tuple[str, ...]:
    """The stages of a plan."""
    return ((BUILD,) if plan.mode == ENGINE else ()) + (BENCH,) + ((PERPLEXITY,) if plan.perplexity else ())


def chosen_executor(executor: str, settings: TensorRTLLMRunSettings) -> str:
    """`environment` or `docker` for what a job asks."""
    if executor == "auto":
        return "environment" if settings.environment else "docker"
    return executor


def stored_bytes(folder: Path) -> int:
    """Bytes of the weights in a checkpoint's or an engine's folder."""
    return sum(p.stat().st_size for kind in ("*.safetensors", "*.engine") for p in folder.glob(kind))


def pull_command(settings: TensorRTLLMRunSettings) -> str:
    """What fetches the image, for a person to run."""
    return f"{settings.docker} pull {settings.image}"


def _gpu_obstacles(
    plan: RunPlan, all_stages: tuple[str, ...], numbers: Sequence[int], weight_bytes: int
) -> list[Obstacle]:
    present = gpus()
    if not present:
        return [
            Obstacle(
                all_stages, "no NVIDIA GPU that a driver answers for", "TensorRT-LLM runs on NVIDIA GPUs only",
                "run the handed-over commands on a machine that has one",
            )
        ]  # fmt: skip
    used = [gpu for gpu in present if gpu.index in numbers]
    found = []
    if len(used) < plan.tp_size:
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in present)
        found.append(
            Obstacle(
                all_stages, f"GPU {there}", f"the job shares every layer among {plan.tp_size} GPUs",
                "name as many GPUs that are there in CUDA_ID",
            )
        )  # fmt: skip
    found += [obstacle for gpu in used for obstacle in _one_gpu(plan, all_stages, gpu, weight_bytes)]
    return found + _driver_obstacles(all_stages, used)


def _one_gpu(plan: RunPlan, all_stages: tuple[str, ...], gpu: Gpu, weight_bytes: int) -> list[Obstacle]:
    found, method = [], METHODS[plan.method] if plan.method else None
    lowest, kinds = (method.capability, method.gpus) if method else (AMPERE, "Ampere or later")
    if gpu.capability is not None and gpu.capability < lowest:
        what = f"GPU {gpu.index}, {gpu.name}, with compute capability {gpu.capability[0]}.{gpu.capability[1]}"
        fitting = [m.name for m in METHODS.values() if m.capability <= gpu.capability]
        other = f"choose quant_method {' or '.join(fitting)}, or " if fitting and method else ""
        found.append(
            Obstacle(
                all_stages, what, f"{method.name if method else plan.dtype} needs {lowest[0]}.{lowest[1]} ({kinds})",
                f"{other}run it on such a GPU",
            )
        )  # fmt: skip
    free, wanted = gpu.total_bytes - gpu.used_bytes, int(weight_bytes / plan.tp_size * ROOM)
    if free < wanted:
        found.append(
            Obstacle(
                all_stages, f"{_gb(free)} free of {_gb(gpu.total_bytes)} on GPU {gpu.index}",
                f"weights of {_gb(weight_bytes)} on {plan.tp_size} GPU(s) need about {_gb(wanted)} on each",
                "end what else runs there, or name more GPUs in CUDA_ID",
            )
        )  # fmt: skip
    return found


def _driver_obstacles(all_stages: tuple[str, ...], used: Sequence[Gpu]) -> list[Obstacle]:
    version = driver_version()
    major = int(version.split(".")[0]) if version and version.split(".")[0].isdigit() else None
    if major is None or major >= DRIVER:
        return []
    if major >= COMPATIBLE_DRIVER and not any("GeForce" in gpu.name for gpu in used):
        return []
    return [
        Obstacle(
            all_stages, f"NVIDIA driver {version}",
            f"TensorRT-LLM {LEGACY_VERSION} is built for CUDA 13, which needs driver {DRIVER} (on data-centre GPUs "
            f"{COMPATIBLE_DRIVER})",
            "install a newer driver",
        )
    ]  # fmt: skip


def _environment_obstacles(
    settings: TensorRTLLMRunSettings, all_stages: tuple[str, ...], *, builds: bool
) -> list[Obstacle]:
    if not settings.environment:
        return [
            Obstacle(
                all_stages, "no environment of TensorRT-LLM", "EXECUTOR environment needs its folder",
                "name it in quantdeck.toml: [tensorrt_llm] environment, or set EXECUTOR to docker",
            )
        ]  # fmt: skip
    folder = Path(settings.environment)
    programs = ["trtllm-bench", *(["trtllm-build"] if builds else []), "python3"]
    missing = [name for name in programs if not os.access(folder / "bin" / name, os.X_OK)]
    if missing:
        return [
            Obstacle(
                all_stages, f"no bin/{missing[0]} in {folder}", "it is an environment with TensorRT-LLM",
                f"install tensorrt_llm {LEGACY_VERSION} there, or set EXECUTOR to docker",
            )
        ]  # fmt: skip
    version = installed_version(folder)
    if version is not None and version not in TABLES:
        return [
            Obstacle(
                all_stages, f"TensorRT-LLM {version} in {folder}", f"the options of {', '.join(TABLES)} are known",
                f"install tensorrt_llm {LEGACY_VERSION} there, or set EXECUTOR to docker",
            )
        ]  # fmt: skip
    return []


def installed_version(environment: Path) -> str | None:
    """Version of tensorrt_llm in an environment; None if its metadata is not there."""
    found = sorted(environment.glob("lib/python3*/site-packages/tensorrt_llm-*.dist-info"))
    return found[0].name.removeprefix("tensorrt_llm-").removesuffix(".dist-info") if found else None


def _docker_obstacles(settings: TensorRTLLMRunSettings, all_stages: tuple[str, ...]) -> list[Obstacle]:
    if shutil.which(settings.docker) is None:
        return [
            Obstacle(
                all_stages, f"no program {settings.docker!r} and no environment of TensorRT-LLM",
                "one of them has to run it",
                "install docker with the NVIDIA Container Toolkit, or name an environment in quantdeck.toml: "
                "[tensorrt_llm] environment",
            )
        ]  # fmt: skip
    code, told = _ask([settings.docker, "info", "--format", "{{json .Runtimes}}"])
    if code != 0:
        return [
            Obstacle(
                all_stages, f"a docker that does not answer ({told})", "its daemon has to run, and let this user in",
                f"see what `{settings.docker} info` says",
            )
        ]  # fmt: skip
    found = []
    if "nvidia" not in _runtimes(told) and not any(map(shutil.which, TOOLKIT)):
        found.append(
            Obstacle(
                all_stages, "a docker without NVIDIA's runtime", "containers see no GPU without it",
                "install the NVIDIA Container Toolkit, then run `nvidia-ctk runtime configure --runtime=docker`",
            )
        )  # fmt: skip
    code, told = _ask([settings.docker, "image", "inspect", "--format", "{{.Id}}", settings.image])
    if code != 0:
        found.append(
            Obstacle(
                all_stages, f"no image {settings.image}", "it holds TensorRT-LLM, and jobs pull nothing by themselves",
                f"fetch it once: {pull_command(settings)}",
            )
        )  # fmt: skip
    return found


def _ask(argv: list[str]) -> tuple[int, str]:
    """Exit code and output of a short docker command; its last error line if it failed."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=ASK_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, str(error)
    lines = done.stderr.strip().splitlines()
    return done.returncode, done.stdout if done.returncode == 0 else (lines[-1] if lines else "without a word")


def _runtimes(text: str) -> dict[str, object]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.3g} GB"
