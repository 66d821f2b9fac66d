"""The beat of a runner, and the reasons for which it ends its programs."""

from __future__ import annotations

import logging
import threading

from backend.jobs.store import Job, JobStore

BEAT_EVERY_S = 2.0

log = logging.getLogger("quantdeck.runner")


class Stopped(Exception):  # noqa: N818 - not an error, and never caught as one
    """The runner is to end its programs. What is to be stored then, the subclass tells."""


class Cancelled(Stopped):
    """Somebody cancelled the job."""


class Superseded(Stopped):
    """Another attempt at the job has begun, or the job is gone: nothing may be stored."""


class ShutDown(Stopped):
    """The runner itself was asked to end, as when the machine is shut down: the job is to go on later."""


class Heart(threading.Thread):
    """Counts up the heartbeat of an attempt, and notices when it no longer is the job's own.

    Args:
        store: The job store.
        job: The job with the attempt to beat for.
    """

    def __init__(self, store: JobStore, job: Job) -> None:
        super().__init__(name="heart", daemon=True)
        self.superseded = threading.Event()
        self._store = store
        self._job = job
        self._ended = threading.Event()

    def run(self) -> None:
        """Beat until the end."""
        while not self._ended.is_set():
            try:
                if not self._store.beat(self._job.uid, self._job.attempt):
                    self.superseded.set()
                    return
            except Exception:  # a busy or unreadable store: the held lock still proves the life
                log.debug("no heartbeat", exc_info=True)
            self._ended.wait(BEAT_EVERY_S)

    def end(self) -> None:
        """Beat no more."""
        self._ended.set()
