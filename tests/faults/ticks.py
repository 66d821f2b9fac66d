"""Schedulers whose ticks run inside a test, on a clock that the test sets."""

from __future__ import annotations

import json
import time

from backend.jobs import devices
from backend.jobs.scheduler import Scheduler
from backend.process import boot_id
from tests.jobs.stored import start


class Clock:
    """A monotonic clock that the test sets."""

    def __init__(self):
        self.at = 1000.0

    def __call__(self):
        return self.at


def scheduler_of(home, **more):
    """A scheduler whose launches are only noted, on a clock of its own."""
    launched = []
    made = Scheduler(home, launch=lambda home, uid, attempt: launched.append((uid, attempt)), **more)
    return made, launched


def gpus_are(tmp_path, monkeypatch, rows):
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setenv(devices.FAKE_GPUS, str(path))


def until(condition, seconds=60.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def held(store):
    """Resource -> name of the job that holds it."""
    return {lease.resource: store.get(lease.uid).job_id for lease in store.leases()}


def died(home, store, job, **facts):
    """A job whose runner started and is gone."""
    start(store, job, "cpu:0")
    home.run_dir(job.uid).mkdir(parents=True, exist_ok=True)
    attempt = store.get(job.uid).attempt
    told = {"pid": 0, "started": 1, "boot_id": boot_id(), "attempt": attempt, **facts}
    (home.run_dir(job.uid) / "runner.json").write_text(json.dumps(told))


def played(home, **play):
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / "standin.json").write_text(json.dumps(play))
