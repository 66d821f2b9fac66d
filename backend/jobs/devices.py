"""Which device a job runs on, and who uses the GPUs of this machine; found without importing torch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pynvml

from backend.errors import ConfigError, ConfigErrors

FAKE_GPUS = "QUANTDECK_FAKE_GPUS"
"""Names a JSON file that stands in for the driver in tests: a list of GPUs with `uuid`, `name`, `total_bytes`,
`used_bytes`, `busy` (percent), `capability`, `driver` and `processes` (each with `pid`, `name`, `bytes`), or an object
`{"error": "..."}`."""

FOREIGN_BYTES = 1 << 30
"""More memory than this in use on a GPU that no job holds means that another program works there; the driver itself
and a screen take less."""


@dataclass(frozen=True)
class GpuProcess:
    """A program that holds memory of a GPU; `bytes` is 0 where the driver does not tell."""

    pid: int
    name: str
    bytes: int


@dataclass(frozen=True)
class Gpu:
    """One GPU; `index` counts in PCI order, as `CUDA_ID` does, `uuid` stays the same when others come or go.

    `capability` is CUDA's compute capability, (major, minor); None where the driver does not tell.
    """

    index: int
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int
    processes: tuple[GpuProcess, ...] = ()
    capability: tuple[int, int] | None = None


def gpus() -> list[Gpu]:
    """The NVIDIA GPUs of this machine in PCI order; empty if there is no driver or no GPU.

    A GPU that the driver no longer answers for is left out; the others keep their index.
    """
    if fake := os.environ.get(FAKE_GPUS):
        return _fake_gpus(Path(fake))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            try:
                found.append(_gpu(index))
            except pynvml.NVMLError:
                continue  # it has fallen off the bus
        return found
    except pynvml.NVMLError:
        return []
    finally:
        pynvml.nvmlShutdown()


def driver_version() -> str | None:
    """Version of the NVIDIA driver, e.g. `580.95.05`; None if there is none."""
    if fake := os.environ.get(FAKE_GPUS):
        rows: Any = json.loads(Path(fake).read_text(encoding="utf-8"))
        return next((row["driver"] for row in rows if "driver" in row), None) if isinstance(rows, list) else None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def _gpu(index: int) -> Gpu:
    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    held: dict[int, int] = {}
    for ask in (pynvml.nvmlDeviceGetComputeRunningProcesses, pynvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            for process in ask(handle):
                held[process.pid] = max(held.get(process.pid, 0), process.usedGpuMemory or 0)
        except pynvml.NVMLError:
            continue  # not every GPU tells
    processes = tuple(GpuProcess(pid, _process_name(pid), size) for pid, size in sorted(held.items()))
    return Gpu(
        index, str(pynvml.nvmlDeviceGetUUID(handle)), str(pynvml.nvmlDeviceGetName(handle)),
        int(memory.total), int(memory.used), processes, _capability(handle),
    )  # fmt: skip


def _capability(handle: Any) -> tuple[int, int] | None:
    try:
        major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    except pynvml.NVMLError:
        return None
    return int(major), int(minor)


def _process_name(pid: int) -> str:
    try:
        return psutil.Process(pid).name()
    except psutil.Error:
        return "unknown"


def _fake_gpus(path: Path) -> list[Gpu]:
    rows: Any = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(rows, dict):
        return []  # as a driver that fails
    found = []
    for index, row in enumerate(rows):
        if row.get("lost"):
            continue
        processes = tuple(GpuProcess(**process) for process in row.get("processes", ()))
        used = row.get("used_bytes", sum(process.bytes for process in processes))
        name, total = row.get("name", "Fake GPU"), row.get("total_bytes", 80 << 30)
        capability = tuple(row["capability"]) if row.get("capability") else None
        found.append(Gpu(index, row.get("uuid", f"GPU-fake-{index}"), name, total, used, processes, capability))
    return found


def foreign_use(gpu: Gpu) -> str | None:
    """Who works on a GPU that no job holds, in words; None if nobody does."""
    held = sum(process.bytes for process in gpu.processes)
    used = max(gpu.used_bytes, held)
    if used < FOREIGN_BYTES:
        return None
    if not gpu.processes:
        return f"another program holds {used / 1e9:.1f} GB of GPU {gpu.index}"
    largest = max(gpu.processes, key=lambda process: process.bytes)
    others = f" and {len(gpu.processes) - 1} more" if len(gpu.processes) > 1 else ""
    return (
        f"another program (pid {largest.pid}, {largest.name}){others} "
        f"{'hold' if others else 'holds'} {(held or used) / 1e9:.1f} GB of GPU {gpu.index}"
    )


def gpu_names() -> list[str]:
    """Names of the GPUs of this machine in PCI order; empty if there is no driver or no GPU."""
    return [gpu.name for gpu in gpus()]


def gpu_numbers(device: str) -> tuple[int, ...]:
    """The GPU numbers of `cuda:N` or `cuda:N,M`; none of `cpu`."""
    return tuple(int(number) for number in device.removeprefix("cuda:").split(",")) if device != "cpu" else ()


def choose_device(cuda_id: str) -> str:
    """The device for a `CUDA_ID`: `cuda:N` or `cuda:N,M` with all its numbers, or `cpu` on a machine without a GPU.

    Raises:
        ConfigErrors: If there are GPUs, but not those, or one is named twice.
    """
    present = gpus()
    if not present:
        return "cpu"
    numbers = [int(number) for number in cuda_id.split(",")]
    known = {gpu.index for gpu in present}
    why = ""
    if missing := [number for number in numbers if number not in known]:
        there = ", ".join(f"{gpu.index} ({gpu.name})" for gpu in present)
        why = f"found GPU {missing[0]}; this machine has {there}"
    elif len(set(numbers)) < len(numbers):
        why = f"found {cuda_id!r}; name each GPU once"
    if why:
        raise ConfigErrors([ConfigError(why, key="CUDA_ID", value=cuda_id)])
    return f"cuda:{','.join(map(str, numbers))}"


def device_environment(device: str, uuids: Sequence[str] = ()) -> dict[str, str]:
    """Environment variables that show a process this device alone.

    Inside such a process the first GPU is always `cuda:0`.

    Args:
        device: `cpu`, `cuda:N` or `cuda:N,M`.
        uuids: The UUIDs of the GPUs that were leased; by default those that have the device's numbers now.
    """
    chosen = list(uuids)
    if device != "cpu" and not chosen:
        by_index = {gpu.index: gpu.uuid for gpu in gpus()}
        chosen = [by_index.get(number, str(number)) for number in gpu_numbers(device)]
    visible = "" if device == "cpu" else ",".join(chosen)
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def torch_device(device: str) -> str:
    """What torch calls the (first) device inside a process with `device_environment`."""
    return "cpu" if device == "cpu" else "cuda:0"


def describe_device(device: str) -> str:
    """The device in words, for the report."""
    if device == "cpu":
        return f"CPU, {os.cpu_count()} cores"
    names = {gpu.index: gpu.name for gpu in gpus()}
    return "; ".join(f"GPU {number}, {names[number]}" if number in names else f"GPU {number}"
                     for number in gpu_numbers(device))  # fmt: skip
