"""One step of a job, and what the runner has to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from backend.engines.configurations import Configuration
from backend.jobs import measure
from backend.jobs.program import Command
from backend.jobs.run import Run


def _nothing(run: Run) -> None:
    """For stages that leave nothing to do."""


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
        name: Name in events and timings.
        label: Name for people.
        command: The program to start, or None if `finish` does the work (or there is none to do).
        finish: Done by the runner after the program has ended well, or its result was taken over.
        key: Digest of everything that the result depends on; None for a stage that is done anew by every attempt.
        intact: Whether what the stage made beside its result file still is there.
        configuration: The one that the stage is about; None if it is about the whole job.
        makes_models: Whether it makes the models that are published, or looks at them before that.
        may_fail: Whether the job goes on with the other configurations if the stage fails.
        writes: Where the stage writes most, and the bytes that it still has to write at most; for a full disk.
    """

    name: str
    label: str
    command: Callable[[Run], Command | None] = lambda run: None
    finish: Callable[[Run], None] = _nothing
    key: Callable[[Run], str] | None = None
    intact: Callable[[Run], bool] = lambda run: True
    configuration: Configuration | None = None
    makes_models: bool = False
    may_fail: bool = False
    writes: Callable[[Run], tuple[Path, int | None]] = lambda run: (run.run_dir, None)

    @property
    def file(self) -> str:
        """Name of the stage's request and result, without its ending."""
        return measure.file_name(self.name, self.configuration)
