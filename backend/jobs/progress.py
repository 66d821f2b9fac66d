"""What a job's row tells of its progress: the stage, its steps, and how long they still take."""

from __future__ import annotations

import contextlib
import logging
import time
from typing import Any

from backend.disk import DiskFullError, is_disk_full
from backend.errors import JobError
from backend.jobs.redact import redact
from backend.jobs.store import Job, JobStore

STORE_EVERY_S = 1.0

log = logging.getLogger("quantdeck.runner")


class Progress:
    """Stores the progress of one attempt, about once a second.

    Args:
        store: The job store.
        job: The job, at the attempt.
    """

    def __init__(self, store: JobStore, job: Job) -> None:
        self._store, self._job = store, job
        self._stored_at = float("-inf")
        self._unstored: dict[str, Any] = {}
        self._shown: dict[str, Any] = {}
        self._first_steps: dict[tuple[str, str], tuple[int, float]] = {}

    def work(self) -> tuple[str, str]:
        """The stage and the configuration that are shown now; empty for none."""
        shown = self._shown
        return str(shown.get("stage") or ""), str(shown.get("configuration") or "")

    def tell(self, message: str) -> None:
        """Show a message in place of the last one; that it cannot be stored stops nothing."""
        with contextlib.suppress(JobError):
            self.show({**self._shown, "eta_s": None, "message": message}, force=True)

    def follow(self, event: dict[str, Any]) -> None:
        """Take an event of a stage program."""
        if "stage" not in event:
            return
        about = event.get("configuration") or ""
        step, total = event.get("step") or 0, event.get("total") or 0
        progress = {
            "stage": event["stage"],
            "step": step,
            "total": total,
            "eta_s": self._eta((event["stage"], about), step, total, event["t"]),
            "message": redact(str(event.get("message") or event.get("layer") or "")),
            **({"configuration": about} if about else {}),
        }
        self.show(progress, force=step == total)

    def _eta(self, stage: tuple[str, str], step: int, total: int, at: float) -> float | None:
        """Seconds left in a stage of a configuration.

        It is judged from the pace since the first step: the loading before that says nothing about steps.
        """
        if not step:
            return None
        first_step, first_at = self._first_steps.setdefault(stage, (step, at))
        if step <= first_step or at < first_at:  # the clock was set back
            return None
        return round((at - first_at) / (step - first_step) * (total - step), 1)

    def show(self, progress: dict[str, Any], *, force: bool) -> None:
        """Take the present progress; `force` has it stored at once."""
        self._unstored = self._shown = progress
        self.store(force=force)

    def store(self, *, force: bool = False) -> None:
        """Store the latest progress, about once a second: the last of a burst of events must not be lost."""
        if self._unstored and (force or time.monotonic() - self._stored_at >= STORE_EVERY_S):
            self._stored_at = time.monotonic()
            try:
                self._store.update(self._job.uid, self._job.attempt, progress=self._unstored)
            except JobError as error:
                if is_disk_full(error):
                    raise DiskFullError(self._store.home.jobs_db) from error
                log.warning("progress was not stored: %s", error.message)
                return
            self._unstored = {}
