"""Whether a job's memory is there, and what to change if it is not."""

from __future__ import annotations

from collections.abc import Sequence

from backend.jobs.memory_estimate import MemoryNeed
from backend.jobs.room import amount

PARTS = {"quantize": "Quantizing", "measure": "Measuring"}


def memory_warnings(needs: Sequence[MemoryNeed], free: int, total: int) -> tuple[str, ...]:
    """A sentence for each part of a job that may not fit, with what would need less.

    Args:
        needs: What the parts need.
        free: Bytes that are free now where the job will run.
        total: Bytes that there are in all.
    """
    return tuple(_warning(need, free, total) for need in needs if need.high > free)


def _warning(need: MemoryNeed, free: int, total: int) -> str:
    there = "this machine" if need.where == "memory" else "the GPU"
    if need.low > total:
        told = f"and {there} has {amount(total)}: it will not fit."
    else:
        told = f"and {amount(free)} are free now, of {amount(total)}: it may not fit."
    advice = [*need.advice, "a machine with more memory" if need.low > total else "ending what else runs here"]
    return (
        f"{PARTS[need.what]} needs {told_range(need)} of {need.where}, {told} Try {', or '.join(advice)}. "
        f"Added up: {need.basis}."
    )


def told_range(need: MemoryNeed) -> str:
    """About how much a part needs."""
    return f"about {_short(need.low)} to {_short(need.high)} GB"


def _short(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.1f}" if n_bytes < 10e9 else f"{n_bytes / 1e9:.0f}"
