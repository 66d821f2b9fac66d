"""The shell script that finishes a job on another machine: copy the result's folder there and run it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path

from backend.tensorrt_llm.executors import container_command, docker_run, mounts, volume
from backend.tensorrt_llm.methods import ENGINE, IMAGE
from backend.tensorrt_llm.plan import BASELINE, RunPlan, Step, serve_step, steps

PORT = 8000


class Fragment(str):
    """Text that stands in a script as it is: it holds a variable of the shell, and is quoted already."""


def shell_script(plan: RunPlan, folder: Path, image: str = IMAGE) -> str:
    """A POSIX sh script with the exact docker commands of a plan.

    `sh NAME` builds the engine, if the plan has one, and measures; `sh NAME serve` serves the result on 127.0.0.1:8000
    once that is done. All folders are relative to the script's own; the 16-bit model, if it is not in there, is named
    by the variable MODEL, and is not measured without it.

    Args:
        plan: The plan; `work` holds the files of `inputs.write_inputs`.
        folder: The folder that the script lies in, on this machine.
        image: The container image.

    Returns:
        The script.

    Raises:
        ValueError: If a folder that is needed lies outside.
    """
    baseline = [_docker(plan, step, folder, image) for step in steps(plan) if step.which == BASELINE]
    quantized = [_docker(plan, step, folder, image) for step in steps(plan) if step.which != BASELINE]
    made = [plan.work, *((plan.engine, plan.logits_engine) if plan.mode == ENGINE else ())]
    lines = [
        "#!/bin/sh",
        "# Runs this result in TensorRT-LLM. Needs an NVIDIA GPU, docker and the NVIDIA Container Toolkit.",
        "set -e",
        'cd "$(dirname "$0")"',
        f"docker image inspect {shlex.quote(image)} >/dev/null || docker pull {shlex.quote(image)}",
        f"mkdir -p {join(str(path.relative_to(folder)) for path in made)}",
        'if [ "${1:-}" = serve ]; then',
        f"  exec {_docker(plan, serve_step(plan, PORT), folder, image, PORT)}",
        "fi",
    ]
    if baseline and _outside(plan, folder, "model"):
        lines += [
            "# MODEL: absolute folder of the 16-bit model that this result was made from (files, not links)",
            'if [ -n "${MODEL:-}" ]; then', *(f"  {line}" for line in baseline), "else",
            "  echo 'MODEL is not set: the 16-bit model is not measured' >&2", "fi",
        ]  # fmt: skip
    else:
        lines += baseline
    return "\n".join(lines + quantized) + "\n"


def join(argv: Iterable[str]) -> str:
    """`shlex.join`, with fragments left as they are."""
    return " ".join(word if isinstance(word, Fragment) else shlex.quote(word) for word in argv)


def _docker(plan: RunPlan, step: Step, folder: Path, image: str, port: int | None = None) -> str:
    volumes = [_volume(plan, folder, name, writable) for name, writable in mounts(step).items()]
    gpus = "all" if plan.tp_size == 1 else str(plan.tp_size)
    user = Fragment('"$(id -u):$(id -g)"')
    return join(docker_run(container_command(plan, step), volumes, image, gpus=gpus, user=user, port=port))


def _volume(plan: RunPlan, folder: Path, name: str, writable: bool) -> Fragment:
    """`-v`'s value: docker takes absolute folders, and where they are is known only there."""
    if name == "model" and _outside(plan, folder, name):
        return Fragment(volume('"$MODEL"', name, writable))
    return Fragment('"$PWD"/' + shlex.quote(volume(_relative(plan, folder, name), name, writable)))


def _outside(plan: RunPlan, folder: Path, name: str) -> bool:
    return not getattr(plan, name).is_relative_to(folder)


def _relative(plan: RunPlan, folder: Path, name: str) -> str:
    """A folder of the plan as it is beside the script.

    Raises:
        ValueError: If it is elsewhere.
    """
    return str(getattr(plan, name).relative_to(folder))
