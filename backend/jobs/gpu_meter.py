"""How much of a job's GPUs is in use, asked every second: the driver stays open, and is asked for two numbers only."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pynvml

from backend.jobs.devices import FAKE_GPUS, gpus


@dataclass(frozen=True)
class GpuUse:
    """One GPU at one moment.

    Attributes:
        index: Its number in PCI order.
        used: Bytes of its memory in use, by whomever.
        total: Bytes of memory that it has.
        busy: Share of the last second in which it worked, percent; None where the driver does not tell.
    """

    index: int
    used: int
    total: int
    busy: float | None


class GpuMeter:
    """Reads GPUs by their UUIDs, as a context: inside it the driver stays open, since opening it takes long.

    Args:
        uuids: Of the GPUs.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = tuple(uuids)
        self._fake = os.environ.get(FAKE_GPUS)
        self._open = False

    def __enter__(self) -> GpuMeter:
        if self._uuids and not self._fake:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlInit()
                self._open = True
        return self

    def __exit__(self, *exception: object) -> None:
        if self._open:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def read(self) -> list[GpuUse]:
        """The GPUs now; one that the driver no longer answers for is left out."""
        return list(self._read_fake(Path(self._fake)) if self._fake else self._read())

    def _read(self) -> Iterator[GpuUse]:
        for uuid in self._uuids if self._open else ():
            with contextlib.suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                index = int(pynvml.nvmlDeviceGetIndex(handle))
                yield GpuUse(index, int(memory.used), int(memory.total), _busy(handle))

    def _read_fake(self, path: Path) -> Iterator[GpuUse]:
        for gpu in gpus():
            if gpu.uuid in self._uuids:
                busy = json.loads(path.read_text(encoding="utf-8"))[gpu.index].get("busy")
                yield GpuUse(gpu.index, gpu.used_bytes, gpu.total_bytes, busy)


def _busy(handle: Any) -> float | None:
    try:
        return float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:
        return None  # as of a part of a GPU
