"""What a job takes while it runs: its chart, and in words what it takes now, the most, and the means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import plotly.graph_objects as go

from backend.jobs.gpu_meter import GpuUse
from backend.jobs.usage import Sample, read_usage
from ui.format import size
from ui.layout import esc
from ui.usagechart import stage_name, usage_chart

HINT = (
    "Of all processes of the job, looked at once a second. Memory that processes share counts in each of them; model "
    "files that are mapped count as far as they are in memory. What runs in containers is not seen."
)


@lru_cache(maxsize=32)
def samples_of(path: Path, version: tuple[int, int]) -> list[Sample]:
    """The samples of a job, read once for all visitors as long as the file is of that version."""
    return read_usage(path)


def pace_s(n_bytes: int) -> float:
    """How long a chart of a file of that size may stand, seconds: the longer the job, the less a second changes it."""
    return min(10.0, max(1.0, n_bytes / 20_000))


@dataclass(frozen=True)
class Peaks:
    """What a job took at most.

    Attributes:
        most: The sample with most memory.
        cores: In use on average.
        gpus: Each GPU with the most memory it had in use, and the mean of `busy` where the driver tells.
    """

    most: Sample
    cores: float
    gpus: tuple[GpuUse, ...]


def peaks(samples: Sequence[Sample]) -> Peaks:
    """The most and the means of some samples, at least one."""
    seconds = sum(one.seconds for one in samples) or 1.0
    by_index: dict[int, list[tuple[float, GpuUse]]] = {}
    for one in samples:
        for gpu in one.gpus:
            by_index.setdefault(gpu.index, []).append((one.seconds, gpu))
    return Peaks(
        max(samples, key=lambda one: one.memory),
        sum(one.cores * one.seconds for one in samples) / seconds,
        tuple(_gpu_peak(seen) for _, seen in sorted(by_index.items())),
    )


def _gpu_peak(seen: Sequence[tuple[float, GpuUse]]) -> GpuUse:
    told = [(seconds, gpu.busy) for seconds, gpu in seen if gpu.busy is not None]
    total = sum(seconds for seconds, _ in told)
    most = max((gpu for _, gpu in seen), key=lambda gpu: gpu.used)
    return replace(most, busy=sum(s * busy for s, busy in told) / total if total else None)


def usage_words(samples: Sequence[Sample], algorithm: str, *, running: bool) -> str:
    """What is used now, the most so far, and the means, as HTML.

    Args:
        samples: Of all attempts, at least one.
        algorithm: Of the job.
        running: Whether the last sample is of now.
    """
    found, last = peaks(samples), samples[-1]
    words = [f"Now {size(last.memory)}, {last.cores:.1f} cores."] if running else []
    words.append(
        f"At most {size(found.most.memory)} of memory, all processes together ({stage_name(algorithm, found.most)}); "
        f"on average {found.cores:.1f} processor cores."
    )
    for gpu in found.gpus:
        busy = "" if gpu.busy is None else f", busy {gpu.busy:.0f} % of the time"
        words.append(f"GPU {gpu.index}: at most {size(gpu.used)} of {size(gpu.total)}{busy}.")
    return f'<p class="qd-muted qd-small qd-caption" title="{esc(HINT)}">{esc(" ".join(words))}</p>'


def drawn(path: Path, version: tuple[int, int], algorithm: str, *, running: bool) -> tuple[go.Figure, str] | None:
    """Chart and words of a job's file; None if there is nothing in it."""
    samples = samples_of(path, version)
    if not samples:
        return None
    return usage_chart(samples, algorithm), usage_words(samples, algorithm, running=running)
