"""`/health`, and the thread by which an open dashboard keeps the scheduler going."""

from __future__ import annotations

import logging
import os
import platform
import sqlite3
import threading
import tomllib
from contextlib import suppress
from importlib.metadata import version
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs import launch
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.process import lock_is_held

WATCH_S = 2.0
PROGRAMS = ("gradio", "fastapi", "uvicorn", "pydantic")

log = logging.getLogger("quantdeck")


def health(home: Home) -> dict[str, Any]:
    """Whether the job store answers, who is working on it, and the versions of what runs here."""
    facts: dict[str, Any] = {
        "status": "ok",
        "quantdeck": tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"],
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        **{name: version(name) for name in PROGRAMS},
        "dashboard": os.getpid(),
        "scheduler": None,
    }
    try:
        store = JobStore(home)
        facts["journal"] = store.journal()
        if lock_is_held(home.private / "scheduler.lock"):
            pids = [one.pid for one in store.instances() if one.kind == "scheduler"]
            facts["scheduler"] = pids[-1] if pids else None
        facts["jobs"] = store.counts()
    except QuantdeckError as error:
        log.error("health: %s", error.message)
        facts["status"] = "the job store cannot be used; the dashboard's log says why"
    return facts


class Watcher:
    """While the dashboard is open, sees to it that jobs which wait or run have a scheduler.

    Args:
        home: The home.
        every_s: Seconds between two looks; None for `WATCH_S`.
    """

    def __init__(self, home: Home, every_s: float | None = None) -> None:
        self.home = home
        self.every_s = WATCH_S if every_s is None else every_s
        self._number: int | None = None
        self._told = ""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)

    def start(self) -> None:
        """Note this dashboard in the store, and begin."""
        with suppress(QuantdeckError):
            self._number = JobStore(self.home).register("dashboard")
        self._thread.start()

    def stop(self) -> None:
        """End, and remove the note."""
        self._end.set()
        self._thread.join(10)
        if self._number is not None:
            with suppress(QuantdeckError):
                JobStore(self.home).unregister(self._number)

    def _watch(self) -> None:
        while not self._end.wait(self.every_s):
            try:
                launch.watch(self.home)
                self._told = ""
            except Exception as error:  # a full disk or a busy store now; the next look may find it well again
                if str(error) != self._told:
                    log.error("the jobs cannot be watched now: %s", error)
                self._told = str(error)
