"""What the pages read of the job store, and what they say while it cannot be read.

A page never shows a stack trace for a busy, missing or damaged store: it says what is wrong, keeps what it shows, and
asks again at its next tick.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any

import gradio as gr

from backend.errors import JobError
from backend.jobs import database
from backend.jobs.launch import scheduler_lock
from backend.jobs.states import State
from backend.jobs.store import Job, JobStore, StoreBusyError
from backend.paths import Home
from backend.process import lock_is_held
from ui.layout import notice

WAIT_S = 2.0  # for a busy store; all visitors share few threads, so none may wait long
MAX_UID = 200
WAITING: tuple[State, ...] = ("queued", "starting", "lost")


@contextmanager
def briefly() -> Iterator[None]:
    """Within the block a busy store is an error soon, not after a minute."""
    with database.at_most(WAIT_S):
        yield


def find(home: Home, uid: str) -> Job | None:
    """The job of this uid or name; None if there is none.

    Raises:
        JobError: If the store cannot be read.
    """
    if not uid:
        return None
    store = JobStore(home)
    try:
        return store.get(whole(uid))
    except JobError:
        store.counts()  # fails as well if the store is the trouble
        return None


def store_notice(error: JobError) -> str:
    """What a page says while the store cannot be read."""
    busy = isinstance(error, StoreBusyError)
    heading = "The job store is busy" if busy else "The job store cannot be read"
    after = "What you see is how it was before. This page tries again by itself; running jobs go on."
    return notice("warn" if busy else "error", heading, f"{error.message.rstrip('.')}. {after}")


def scheduler_is_missing(home: Home, counts: dict[str, int]) -> bool:
    """Whether jobs wait although no scheduler runs. For a moment that is normal: one is started when it is noticed."""
    waiting = sum(counts.get(state, 0) for state in WAITING)
    return waiting > 0 and not lock_is_held(scheduler_lock(home))


def asked(event: gr.EventData) -> tuple[str, str]:
    """What a click on one of our own buttons asks for; empty for what cannot have come from one."""
    data: Any = getattr(event, "_data", None)
    act, uid = (data.get("act"), data.get("uid")) if isinstance(data, dict) else ("", "")
    good = isinstance(act, str) and isinstance(uid, str) and len(uid) <= MAX_UID
    return (whole(act), whole(uid)) if good else ("", "")


def whole(text: str) -> str:
    """A text of a request without half characters, which JSON can carry and the store cannot."""
    return text.encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Told:
    """What the list tells of a job's result; reading it takes the whole result, so it is kept.

    Attributes:
        headline: HTML.
        measured: Whether there are numbers to compare.
    """

    headline: str
    measured: bool


class Results:
    """The `Told` of jobs whose result does not change any more, for all visitors.

    Args:
        limit: Number of jobs kept.
    """

    def __init__(self, limit: int = 2000) -> None:
        self._kept: OrderedDict[tuple[str, int, str], Told] = OrderedDict()
        self._lock = Lock()
        self._limit = limit

    def get(self, job: Job) -> Told | None:
        """What is kept of the job as it is now."""
        with self._lock:
            key = (job.uid, job.attempt, job.state)
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, job: Job, told: Told) -> None:
        """Keep what the list tells of a job."""
        with self._lock:
            self._kept[job.uid, job.attempt, job.state] = told
            while len(self._kept) > self._limit:
                self._kept.popitem(last=False)
