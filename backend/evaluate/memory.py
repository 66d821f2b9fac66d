"""Resident memory of this process, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def resident_bytes() -> int:
    """Memory of this process that is in RAM now (where /proc is absent: its peak)."""
    return _status("VmRSS") or _rusage_peak()


def peak_resident_bytes() -> int:
    """Highest resident memory since the start, or since the last successful `reset_peak`."""
    return _status("VmHWM") or _rusage_peak()


def reset_peak() -> bool:
    """Start a new peak at today's resident memory; False where the kernel does not offer that."""
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")  # 5 resets VmHWM, see proc(5)
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def _rusage_peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
