"""What a job takes while it runs: memory, processor cores and its GPUs, second by second, in a file that stays small.

`usage.jsonl` of the job's folder has one line per sample. Once it is too long, older samples are joined in pairs, and
those pairs later on: of a job that runs for days the last minutes are there by the second, the rest by the minute.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from backend.jobs.events import end_torn_line, read_events
from backend.jobs.gpu_meter import GpuMeter, GpuUse
from backend.jobs.processes import Spent, tree

USAGE_FILE = "usage.jsonl"
EVERY_S = 1.0
LEAST_S = 0.1  # of a last sample
MAX_BYTES = 400_000
LATEST = 300
"""Samples at the end that are never joined."""

log = logging.getLogger("quantdeck.runner")


@dataclass(frozen=True)
class Sample:
    """What a job's processes took during a few seconds.

    Attributes:
        attempt: Of the job.
        at: Seconds since the attempt began, by a clock that nobody sets, at the end of these seconds.
        seconds: How many seconds it stands for.
        stage: The stage, as in events; empty before the first.
        configuration: That was worked at; empty if the job has one.
        memory: Bytes in memory, the most of these seconds; pages that processes share count in each of them.
        cores: Processor cores in use, on average.
        gpus: The job's GPUs: the most memory, and the mean of `busy`.
    """

    attempt: int
    at: float
    seconds: float
    stage: str
    configuration: str
    memory: int
    cores: float
    gpus: tuple[GpuUse, ...] = ()


def read_usage(path: Path) -> list[Sample]:
    """The samples of all attempts, oldest first; lines that are damaged are left out."""
    return [sample for line in read_events(path)[0] if (sample := _sample(line)) is not None]


def _sample(line: Mapping[str, Any]) -> Sample | None:
    try:
        gpus = tuple(GpuUse(int(i), int(used), int(total), busy if busy is None else float(busy))
                     for i, used, total, busy in line.get("gpus") or ())  # fmt: skip
        return Sample(
            int(line["attempt"]), float(line["at"]), float(line["seconds"]), str(line.get("stage") or ""),
            str(line.get("configuration") or ""), int(line["memory"]), float(line["cores"]), gpus,
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _line(sample: Sample) -> str:
    told = {**asdict(sample), "gpus": [[g.index, g.used, g.total, g.busy] for g in sample.gpus]}
    return json.dumps({key: value for key, value in told.items() if value not in ("", [])}) + "\n"


def joined(samples: Sequence[Sample], room: int) -> list[Sample]:
    """The same in at most `room` samples: neighbours of one stage become one, the shortest first.

    The last `LATEST` stay as they are. What still does not fit, as of a job with thousands of attempts, is left out at
    the beginning.
    """
    old, latest = list(samples[:-LATEST]), list(samples[-LATEST:])
    longest = 2 * EVERY_S
    while len(old) + len(latest) > room and longest < 1e9:
        old, longest = _in_pairs(old, 1.5 * longest), 2 * longest
    return [*old, *latest][-room:]


def _in_pairs(samples: Iterable[Sample], longest: float) -> list[Sample]:
    """Neighbours as one wherever that stands for no more than so many seconds."""
    found: list[Sample] = []
    alone = False  # whether the last one found has not been joined yet
    for one in samples:
        last = found[-1] if found else None
        if alone and last and _same_work(last, one) and last.seconds + one.seconds <= longest:
            found[-1], alone = _join(last, one), False
        else:
            found.append(one)
            alone = True
    return found


def _same_work(a: Sample, b: Sample) -> bool:
    return (a.attempt, a.stage, a.configuration, len(a.gpus)) == (b.attempt, b.stage, b.configuration, len(b.gpus))


def _join(a: Sample, b: Sample) -> Sample:
    seconds = a.seconds + b.seconds

    def mean(x: float, y: float) -> float:
        return round((x * a.seconds + y * b.seconds) / seconds, 2)

    gpus = tuple(
        replace(
            mine,
            used=max(mine.used, other.used),
            busy=None if mine.busy is None or other.busy is None else mean(mine.busy, other.busy),
        )
        for mine, other in zip(a.gpus, b.gpus, strict=True)
    )
    memory, cores = max(a.memory, b.memory), mean(a.cores, b.cores)
    return replace(b, seconds=round(seconds, 2), memory=memory, cores=cores, gpus=gpus)


class UsageFile:
    """The samples on disk.

    Args:
        path: `usage.jsonl`; what is there already is kept.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = end_torn_line(path)

    def add(self, sample: Sample) -> None:
        """Append a sample; joins older ones once there are too many."""
        line = _line(sample).encode()
        with open(self._path, "ab") as file:
            file.write(line)
        self._bytes += len(line)
        if self._bytes > MAX_BYTES:
            self._shrink()

    def _shrink(self) -> None:
        samples = read_usage(self._path)
        room = max(LATEST, len(samples) // 2)
        text = "".join(map(_line, joined(samples, room)))
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")  # not synced: a lost chart is no lost work
        os.replace(temporary, self._path)
        self._bytes = len(text)


class Sampler(threading.Thread):
    """Takes a sample each second, as a context: until its end.

    Nothing that goes wrong here disturbs the job.

    Args:
        path: `usage.jsonl`.
        attempt: Of the job.
        gpus: Asked once for the UUIDs of the job's GPUs.
        work: Stage and configuration now.
    """

    def __init__(
        self, path: Path, attempt: int, gpus: Callable[[], Sequence[str]], work: Callable[[], tuple[str, str]]
    ) -> None:
        super().__init__(name="usage", daemon=True)
        self._path, self._attempt, self._gpus, self._work = path, attempt, gpus, work
        self._ended = threading.Event()
        self._superseded = False

    def __enter__(self) -> Sampler:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._superseded = kind is not None  # another attempt may have begun
        self._ended.set()
        self.join(2 * EVERY_S)  # it may be writing; it is not waited for if the disk does not answer

    def run(self) -> None:
        """Sample until the end."""
        try:
            with GpuMeter(self._gpus()) as meter:
                self._sample(UsageFile(self._path), meter)
        except Exception:
            log.warning("what the job takes is not noted from here on", exc_info=True)

    def _sample(self, file: UsageFile, meter: GpuMeter) -> None:
        began = last = time.monotonic()
        before = tree(os.getpid())
        ended = False
        while not ended:
            ended = self._ended.wait(EVERY_S)
            now, after = time.monotonic(), tree(os.getpid())
            if ended and (self._superseded or now - last < LEAST_S):
                return
            stage, configuration = self._work()
            sample = Sample(
                self._attempt, round(now - began, 2), round(now - last, 2), stage, configuration,
                sum(one.resident_bytes for one in after.values()), _cores(before, after, now - last),
                tuple(meter.read()),
            )  # fmt: skip
            try:
                file.add(sample)
            except OSError:
                log.debug("a sample was not written", exc_info=True)
            last, before = now, after


def _cores(before: Mapping[Any, Spent], after: Mapping[Any, Spent], seconds: float) -> float:
    """Cores in use between two looks; what ended in between is not counted after the first one."""
    spent = sum(one.cpu_s - (before[key].cpu_s if key in before else 0.0) for key, one in after.items())
    return round(max(0.0, spent) / seconds, 2)
