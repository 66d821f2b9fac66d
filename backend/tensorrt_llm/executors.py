"""How a step's program is started: in an environment where TensorRT-LLM is installed, or in a container.

Killing the docker client does not end its container, which would go on holding the GPU: `end` does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from backend.tensorrt_llm.command import build_command
from backend.tensorrt_llm.flags import SERVE
from backend.tensorrt_llm.methods import LEGACY_VERSION
from backend.tensorrt_llm.plan import INSIDE, PYTHON, RunPlan, Step

SERVE_PORT = 8000
"""Where a server listens inside its container."""
DOCKER_WAIT_S = 30.0
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


class Executor(Protocol):
    """Where TensorRT-LLM is."""

    @property
    def gpus(self) -> tuple[str, ...]:
        """UUIDs of the GPUs that its programs use."""
        ...

    def argv(self, plan: RunPlan, step: Step, name: str) -> list[str]:
        """What to start for a step; `name` is unique to the job and names its container."""
        ...

    def variables(self) -> dict[str, str]:
        """The environment variables to start it with."""
        ...

    def end(self, name: str) -> None:
        """End what the process of that name may have started outside itself; nothing happens if there is nothing."""
        ...

    def about(self) -> dict[str, str]:
        """What it is, for the record."""
        ...


def tool_command(step: Step, place: Callable[[Path], Path], version: str = LEGACY_VERSION) -> list[str]:
    """A step's own command line.

    Args:
        step: The step.
        place: Where the program finds a path of this machine.
        version: TensorRT-LLM's.

    Raises:
        ConfigError: If the tables do not allow it.
    """
    if step.tool == PYTHON:
        return ["python3", *(str(place(arg)) if isinstance(arg, Path) else arg for arg in step.args)]
    values = {k: place(v) if isinstance(v, Path) else v for k, v in step.values.items()}
    return build_command(step.tool, values, version=version)


@dataclass(frozen=True)
class EnvironmentExecutor:
    """A virtual environment with tensorrt_llm.

    Attributes:
        folder: Its absolute folder, with `bin/trtllm-bench`.
        gpus: UUIDs of the GPUs that the programs may use.
        version: Its TensorRT-LLM.
    """

    folder: Path
    gpus: tuple[str, ...]
    version: str = LEGACY_VERSION

    def argv(self, plan: RunPlan, step: Step, name: str) -> list[str]:
        """The program of the environment itself."""
        program, *rest = tool_command(step, lambda path: path, self.version)
        return [str(self.folder / "bin" / program), *rest]

    def variables(self) -> dict[str, str]:
        """Ours without what belongs to our own Python; its programs come first, and only the job's GPUs are seen."""
        own = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        path = os.pathsep.join([str(self.folder / "bin"), own.get("PATH", os.defpath)])
        gpus = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(self.gpus)}
        return {**own, **OFFLINE, **gpus, "PATH": path}

    def end(self, name: str) -> None:
        """Nothing: its processes are ours."""

    def about(self) -> dict[str, str]:
        """Nothing beyond what the reports say."""
        return {}


@dataclass(frozen=True)
class DockerExecutor:
    """A container of the pinned image, without a network except for a server, with the caller's user and rights.

    Attributes:
        image: The image; it must be there, nothing is pulled.
        gpus: UUIDs of the GPUs that the container sees.
        docker: The docker client.
        version: TensorRT-LLM's in the image.
    """

    image: str
    gpus: tuple[str, ...]
    docker: str = "docker"
    version: str = LEGACY_VERSION

    def argv(self, plan: RunPlan, step: Step, name: str) -> list[str]:
        """`docker run` of a step."""
        port = step.values.get("--port") if step.tool == SERVE else None
        # several devices need quotes of their own: docker reads the value as a line of CSV
        chosen = f'"device={",".join(self.gpus)}"' if len(self.gpus) > 1 else f"device={self.gpus[0]}"
        volumes = [volume(str(getattr(plan, n)), n, writable) for n, writable in mounts(step).items()]
        if "model" in step.reads:
            volumes += link_volumes(plan.model, INSIDE["model"])
        return docker_run(
            container_command(plan, step, self.version), volumes, self.image, docker=self.docker, name=name,
            gpus=chosen, user=f"{os.getuid()}:{os.getgid()}", port=port if isinstance(port, int) else None,
        )  # fmt: skip

    def variables(self) -> dict[str, str]:
        """Ours: the client finds its daemon by them."""
        return dict(os.environ)

    def end(self, name: str) -> None:
        """Kill the container of that name, and wait until it is gone."""
        for command in (["kill", name], ["rm", "--force", name]):
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                subprocess.run(
                    [self.docker, *command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL, timeout=DOCKER_WAIT_S, check=False, start_new_session=True,
                )  # fmt: skip

    def about(self) -> dict[str, str]:
        """The image and its content's id, since a tag can be moved."""
        ask = [self.docker, "image", "inspect", "--format", "{{.Id}}", self.image]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(ask, capture_output=True, text=True, timeout=DOCKER_WAIT_S, check=False)
            if done.returncode == 0:
                return {"image": self.image, "image_id": done.stdout.strip()}
        return {"image": self.image}


def container_command(plan: RunPlan, step: Step, version: str = LEGACY_VERSION) -> list[str]:
    """A step's command line as it is inside a container."""
    if step.tool == SERVE:  # reached through a published port, which only this machine's loopback has
        step = replace(step, values={**step.values, "--host": "0.0.0.0", "--port": SERVE_PORT})
    return tool_command(step, lambda path: inside(plan, path), version)


def inside(plan: RunPlan, path: Path) -> Path:
    """Where a container sees a path of one of the plan's folders; the innermost, where one lies in another.

    Raises:
        ValueError: If it lies in none of them.
    """
    folders = {name: getattr(plan, name) for name in INSIDE if getattr(plan, name) is not None}
    holding = [name for name, folder in folders.items() if path.is_relative_to(folder)]
    if not holding:
        raise ValueError(f"{path} lies in none of the folders of the plan")
    name = max(holding, key=lambda name: len(folders[name].parts))
    return Path(INSIDE[name]) / path.relative_to(folders[name])


def mounts(step: Step) -> dict[str, bool]:
    """Names of the plan's folders that a step's container sees, and whether it may write there."""
    return {name: name in step.writes for name in (*step.reads, *step.writes)}


def link_volumes(folder: Path, place: str) -> list[str]:
    """Values of docker's `-v` that let the links of a folder lead to the same files inside a container.

    A model in the Hub's cache consists of links to files beside its folder; a container that sees the folder alone
    would find none of them.

    Args:
        folder: The folder on this machine.
        place: Where a container sees it.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() and path.exists() and not path.resolve().is_relative_to(folder.resolve()):
            link = os.path.join(place, path.parent.relative_to(folder), os.readlink(path))
            found[os.path.dirname(os.path.normpath(link))] = path.resolve().parent
    return [f"{host}:{where}:ro" for where, host in found.items()]


def volume(host: str, name: str, writable: bool) -> str:
    """Value of docker's `-v` for one of the plan's folders."""
    return f"{host}:{INSIDE[name]}" + ("" if writable else ":ro")


def docker_run(
    command: Sequence[str],
    volumes: Sequence[str],
    image: str,
    *,
    gpus: str,
    user: str,
    docker: str = "docker",
    name: str | None = None,
    port: int | None = None,
) -> list[str]:
    """The argv of `docker run`.

    Args:
        command: What runs in the container.
        volumes: As `volume` gives them.
        image: The image.
        gpus: Value of `--gpus`.
        user: `uid:gid`.
        docker: The client.
        name: Of the container.
        port: Port of this machine's loopback that leads to a server; None: the container has no network.
    """
    network = ["-p", f"127.0.0.1:{port}:{SERVE_PORT}"] if port else ["--network", "none"]
    argv = [docker, "run", "--rm", "--init", "--pull", "never", *(["--name", name] if name else []), "--gpus", gpus]
    argv += ["--ipc", "host", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864", *network, "--user", user]
    # the user has no home in the image, and libraries that cache need one and its name
    for key, value in {**OFFLINE, "HOME": INSIDE["work"], "USER": "quantdeck"}.items():
        argv += ["-e", f"{key}={value}"]
    for one in volumes:
        argv += ["-v", one]
    return [*argv, "-w", INSIDE["work"], image, *command]
