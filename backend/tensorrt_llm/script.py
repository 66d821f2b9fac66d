"""The shell script that finishes a job on another machine: copy the result's folder there and run it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from backend.tensorrt_llm.executors import container_command, docker_run, mounts, volume
from backend.tensorrt_llm.methods import ENGINE, IMAGE
from backend.tensorrt_llm.plan import BASELINE, RunPlan, Step, serve_step, steps


class Fragment(str):
    """Text that stands in a script as it is: it holds a variable of the shell, and is quoted already."""


def shell_script(plan: RunPlan, folder: Path, image: str = IMAGE) -> str:
    """A POSIX sh script with the exact docker commands of a plan.

    `sh NAME` builds the engine, if the plan has one, and measures; `sh NAME serve` serves the result on 127.0.0.1:8000.
    All folders are relative to the script's own; what is not in it, usually the 16-bit model, is named by a variable.

    Args:
        plan: The plan; `work` holds the files of `inputs.write_inputs`.
        folder: The folder that the script lies in, on this machine.
        image: The container image.

    Returns:
        The script.
    """
    every = steps(plan)
    needed = [step for step in every if step.which != BASELINE]
    baseline = [step for step in every if step.which == BASELINE]
    outside = _outside(plan, folder, "model")
    lines = [
        "#!/bin/sh",
        "# Runs this result in TensorRT-LLM. Needs an NVIDIA GPU, docker and the NVIDIA Container Toolkit.",
        f"# The image is fetched by: {shlex.join(['docker', 'pull', image])}",
        "set -e",
        'cd "$(dirname "$0")"',
        f"command -v docker >/dev/null || {{ echo {shlex.quote('docker is not installed')} >&2; exit 1; }}",
        f"docker image inspect {shlex.quote(image)} >/dev/null 2>&1 || docker pull {shlex.quote(image)}",
        f"mkdir -p {' '.join(shlex.quote(_relative(plan, folder, name)) for name in _made(plan))}",
    ]
    if outside and (plan.mode == ENGINE or baseline):
        lines.append("# MODEL: folder of the 16-bit model that this result was made from")
    if outside and plan.mode == ENGINE:
        lines.append(': "${MODEL:?set MODEL to the absolute folder of the 16-bit model}"')
    lines += ['if [ "${1:-}" = serve ]; then', f"  exec {_docker(plan, serve_step(plan, 8000), folder, image)}", "fi"]
    if baseline and outside:
        body = [f"  {_docker(plan, step, folder, image)}" for step in baseline]
        lines += [
            'if [ -n "${MODEL:-}" ]; then', *body, "else",
            f"  echo {shlex.quote('MODEL is not set: the 16-bit model is not measured')} >&2", "fi",
        ]  # fmt: skip
    else:
        lines += [_docker(plan, step, folder, image) for step in baseline]
    lines += [_docker(plan, step, folder, image) for step in needed]
    reports = [shlex.quote(str(step.output.relative_to(plan.work))) for step in every if step.output]
    where = shlex.quote(_relative(plan, folder, "work"))
    lines.append(f"ls -l {' '.join(f'{where}/{name}' for name in reports)} 2>/dev/null || true")
    return "\n".join(lines) + "\n"


def join(argv: Iterable[str]) -> str:
    """`shlex.join`, with fragments left as they are."""
    return " ".join(word if isinstance(word, Fragment) else shlex.quote(word) for word in argv)


def _docker(plan: RunPlan, step: Step, folder: Path, image: str) -> str:
    volumes = [_volume(plan, folder, name, writable) for name, writable in mounts(plan, step).items()]
    return join(
        docker_run(
            container_command(plan, step), volumes, image, gpus="all" if plan.tp_size == 1 else str(plan.tp_size),
            user=Fragment('"$(id -u):$(id -g)"'), port=8000 if step.name == "serve" else None,
        )
    )  # fmt: skip


def _volume(plan: RunPlan, folder: Path, name: str, writable: bool) -> Fragment:
    """`-v`'s value: docker takes absolute folders, and where they are is known only there."""
    if _outside(plan, folder, name):
        return Fragment(volume(f'"${{{name.upper()}}}"', name, writable))
    return Fragment('"$PWD"/' + shlex.quote(volume(_relative(plan, folder, name), name, writable)))


def _outside(plan: RunPlan, folder: Path, name: str) -> bool:
    return not getattr(plan, name).is_relative_to(folder)


def _relative(plan: RunPlan, folder: Path, name: str) -> str:
    """A folder of the plan as it is beside the script.

    Raises:
        ValueError: If it is elsewhere.
    """
    return str(getattr(plan, name).relative_to(folder))


def _made(plan: RunPlan) -> list[str]:
    return ["work", *(["engine"] if plan.mode == ENGINE else [])]
