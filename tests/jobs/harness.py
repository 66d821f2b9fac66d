"""Jobs with fake programs in a home: real store, real scheduler and runner processes, helpers to wait and to look."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

from backend.errors import JobError
from backend.jobs import control, doctor, launch
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.process import end_leftovers, processes_of
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.jobs import fake_scheduler

QUICK = "[jobs]\ncancel_grace_s = [1.0, 1.0]\n"


class Jobs:
    """The jobs of one home.

    Args:
        home: The home.
        settings: Its `quantdeck.toml`.
    """

    def __init__(self, home: Home, settings: str = QUICK):
        self.home = home
        home.root.mkdir(parents=True, exist_ok=True)
        (home.root / "quantdeck.toml").write_text(settings)
        self.store = JobStore(home)
        self.started = []
        self.examined = True

    def create(self, *configurations, name="job", measure=False, changes=None, device="cpu", **more):
        """A queued job of these configurations, which nobody starts yet; it may differ from the others' in `more`."""
        (self.home.root / "fake.json").write_text(json.dumps({"configurations": configurations, **more}))
        on = {"EVALUATION": {"TASKS": []}, "BENCHMARK": {}} if measure else {}
        off = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}
        text = demo_text(name, **{**(on or off), **(changes or {})})
        return self.store.create(text, parse_yaml(text).config, device=device)

    def start(self, *configurations, **more):
        """A job that the scheduler starts."""
        job = self.create(*configurations, **more)
        launch.ensure_scheduler(self.home)
        return job

    def launch(self, job, *, resources=("cpu:0",), **variables):
        """Start the runner of a queued job ourselves, as the scheduler would, and return its process."""
        if self.get(job).state == "queued":
            assert self.store.grant(job.uid, job.attempt, resources)
        run_dir = self.home.run_dir(job.uid)
        run_dir.mkdir(parents=True, exist_ok=True)
        argv = [sys.executable, "-m", fake_scheduler.RUNNER, str(self.home.root), job.uid, str(job.attempt)]
        marked = {**os.environ, "QUANTDECK_JOB": f"{job.uid}:{job.attempt}", **variables}
        with open(run_dir / "runner.out", "ab") as out:
            process = subprocess.Popen(argv, cwd=PROJECT, stdout=out, stderr=out, env=marked, start_new_session=True)
        self.started.append(process)
        return process

    def get(self, job):
        return self.store.get(job.uid)

    def until(self, job, condition=lambda job: not job.is_active, seconds=60.0):
        """Wait until the job is as wanted."""
        deadline = time.monotonic() + seconds
        while not condition(now := self.store.get(job.uid)):
            assert time.monotonic() < deadline, f"{now.state}, {now.progress}, {now.reason}\n{self.told(job)}"
            time.sleep(0.05)
        return now

    def at_layer(self, job, layer, attempt=None):
        """Wait until so many layers are done."""
        return self.until(
            job,
            lambda j: (
                j.progress.get("stage") == "quantize" and j.progress.get("step", 0) >= layer
                and (attempt is None or j.attempt == attempt)
            ),
        )  # fmt: skip

    def resume(self, job, **more):
        """Resume a job and wait for its end."""
        control.resume(self.home, job.uid, **more)
        return self.until(job)

    def told(self, job):
        """What runner and scheduler printed, for messages of failed tests."""
        files = [self.home.run_dir(job.uid) / "runner.out", self.home.private / "scheduler.out"]
        return "\n".join(file.read_text() for file in files if file.exists())

    def runner(self, job):
        """The job's runner process."""
        (found,) = [p for p in processes_of(job.uid) if fake_scheduler.RUNNER in cmdline(p)]
        return found

    def engine(self, job):
        """The job's stage program."""
        (found,) = [p for p in processes_of(job.uid) if "tests.jobs.fake" in cmdline(p)]
        return found

    def calls(self, job):
        """With how many layers done the engine started, each time."""
        return json.loads((self.home.run_dir(job.uid) / "calls.json").read_text())

    def log(self, job):
        """The text of the job's log."""
        return control.log_path(self.home, job.uid).read_text()

    def folder(self, job) -> Path:
        """Where the job's model is published."""
        return self.home.root / job.folder

    def is_over(self, job):
        """Nothing of the job is left: no process, no lease."""
        until(lambda: not processes_of(job.uid))
        assert [lease for lease in self.store.leases() if lease.uid == job.uid] == []
        assert self.store.check() == []

    def are_sound(self):
        """If all jobs have ended, the doctor finds nothing (unless `examined` was set to False)."""
        if not self.examined:
            return
        try:
            if any(job.is_active for job in self.store.jobs()):
                return
        except JobError:  # a disk that the test took away
            return
        deadline = time.monotonic() + 20.0  # runners still end after they have told the last state
        while problems := [p.what for f in doctor.examine(self.home, deep=True, grace_s=0.0) for p in f.problems]:
            assert time.monotonic() < deadline, "\n".join(problems)
            time.sleep(0.2)

    def end(self):
        """End everything that works on the home."""
        for process in psutil.process_iter(["cmdline"]):
            if {fake_scheduler.SCHEDULER, str(self.home.root)} <= set(process.info["cmdline"] or []):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        with contextlib.suppress(Exception):
            for job in self.store.jobs():
                end_leftovers(job.uid)
        for process in self.started:
            process.kill()
            process.wait()


def cmdline(process):
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()
