"""Following a job from a terminal: progress lines on standard error until it ends."""

from __future__ import annotations

import sys
import time
from typing import Any

from backend.jobs.control import cancel, events
from backend.jobs.launch import watch
from backend.jobs.store import Job, JobStore, StoreBusyError
from backend.paths import Home

POLL_S = 0.3
WATCH_EVERY_S = 2.0
LINE_EVERY_S = 3.0


def follow(home: Home, uid: str, cursor: int = 0) -> Job:
    """Print the job's progress to standard error until it is in a final state.

    Ctrl-C cancels the job and goes on following until it has ended.

    Args:
        home: The home.
        uid: The job.
        cursor: Where to start in its events; of a resumed job, after those of its earlier attempts.
    """
    store, watched, show = JobStore(home), 0.0, _Printer()
    job = store.get(uid)
    while True:
        try:
            job = store.get(uid)
            fresh, cursor = events(home, uid, cursor)
            for event in fresh:
                show.event(event)
            if job.state == "queued" and job.reason:
                show.line(job.reason)
            if job.stalled:
                show.line("the runner gives no sign of life; it may have been stopped, or the disk does not answer")
            if not job.is_active:
                return job
            if time.monotonic() - watched > WATCH_EVERY_S:
                watch(home)
                watched = time.monotonic()
            time.sleep(POLL_S)
        except StoreBusyError as error:
            show.line(f"{error.message}; trying again")
        except KeyboardInterrupt:
            print("cancelling ...", file=sys.stderr, flush=True)
            if job.is_active:
                cancel(home, uid)


class _Printer:
    """Prints what is new, but not every small step."""

    def __init__(self) -> None:
        self._last = ""
        self._group: tuple[object, ...] | None = None
        self._at = 0.0

    def line(self, text: str) -> None:
        if text and text != self._last:
            print(text, file=sys.stderr, flush=True)
            self._last, self._at = text, time.monotonic()

    def event(self, event: dict[str, Any]) -> None:
        """A layer, a new kind of work and its last step are always shown; steps between only now and then."""
        group = (event.get("stage"), event.get("configuration"), event.get("message"))
        ends = event.get("step") == event.get("total")
        if event.get("layer") or ends or group != self._group or time.monotonic() - self._at > LINE_EVERY_S:
            self._group = group
            self.line(progress_line(event))


def progress_line(event: dict[str, Any]) -> str:
    """One event in one line."""
    if event.get("stage") == "error":
        return ""  # the reason is told once, when the job has ended
    step, total = event.get("step"), event.get("total")
    parts = [f"{event.get('stage', ''):>12}"]
    if total:
        parts.append(f"{step}/{total}")
    if event.get("configuration"):
        parts.append(f"[{event['configuration']}]")
    if event.get("layer"):
        parts.append(f"{event['layer']}{_errors(event)}")
        parts += [str(note) for note in event.get("notes") or []]
    elif event.get("message"):
        parts.append(event["message"])
    return "  ".join(parts)


def _errors(event: dict[str, Any]) -> str:
    """A layer's error and that of rounding to nearest, as far as the engine knows them."""
    if event.get("error") is None:
        return ""
    nearest = f" (round-to-nearest {event['rtn_error']:.3e})" if event.get("rtn_error") is not None else ""
    return f"  error {event['error']:.3e}{nearest}"
