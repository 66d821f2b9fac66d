"""What the parts of an engine's work cost."""

from __future__ import annotations

import resource
import time


class Clock:
    """Wall and CPU seconds since the last lap; the first lap counts CPU time from the process's start.

    Processes that this one started count when they have ended.
    """

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), 0.0

    def lap(self) -> dict[str, float]:
        """`wall_s` and `cpu_s` of the part that ends now."""
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        wall, cpu = time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime
        spent = {"wall_s": round(wall - self._wall, 3), "cpu_s": round(cpu - self._cpu, 3)}
        self._wall, self._cpu = wall, cpu
        return spent
