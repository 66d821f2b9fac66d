"""The memory of this machine: what a job may use of it, and whether its CPU computes bfloat16. Imports no torch."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import psutil

from backend.jobs.devices import gpu_numbers, gpus

CGROUPS = (  # limit, in use; of control groups version 2 and 1, as a container sees its own
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), Path("/sys/fs/cgroup/memory/memory.usage_in_bytes")),
)
CPU_FLAGS = Path("/proc/cpuinfo")


def free_memory(device: str) -> tuple[int, int]:
    """Bytes that are free now, and that there are in all, for a program on this device; of several GPUs the least."""
    if device == "cpu":
        return _host()
    chosen = [gpu for gpu in gpus() if gpu.index in gpu_numbers(device)]
    free = min((gpu.total_bytes - gpu.used_bytes for gpu in chosen), default=0)
    return free, min((gpu.total_bytes for gpu in chosen), default=0)


def _host() -> tuple[int, int]:
    machine = psutil.virtual_memory()
    free, total = int(machine.available), int(machine.total)
    for limit, used in CGROUPS:
        with suppress(OSError, ValueError):  # there is none, or it says "max"
            most = int(limit.read_text())
            if most < total:
                # Part of what is in use is cache that the kernel gives back; how much, only it knows.
                free, total = min(free, most - int(used.read_text()) + _cache(limit.parent)), most
    return max(0, free), total


def _cache(folder: Path) -> int:
    """Bytes of files that a control group has in memory and could give back."""
    with suppress(OSError, ValueError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return 0


@lru_cache(maxsize=1)
def has_bfloat16() -> bool:
    """Whether the CPU has units for bfloat16, as torch asks it."""
    with suppress(OSError):
        for line in CPU_FLAGS.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("flags"):
                return bool({"avx512_bf16", "amx_tile"} & set(line.split()))
    return False
