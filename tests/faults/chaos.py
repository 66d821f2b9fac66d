"""Short jobs under random kill -9: `python -m tests.faults.chaos [--jobs 200] [--seed N] [--home DIR]`.

The real store, scheduler and runner, with an engine that only writes a few bytes. A stand-in for the dashboard (a
process of its own, killed as well) submits the jobs. A seeded driver kills the scheduler, runners, engines and the
stand-in, and cancels and resumes jobs. When all jobs are final, everything must be in order:

- every job whose submission was acknowledged is there, and final;
- no engine was started twice for one attempt, or while another one of the same job was alive;
- the doctor finds nothing, after reading every published file;
- no process and no lease is left.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from backend.errors import ConfigErrors, QuantdeckError
from backend.jobs import control, doctor, launch
from backend.jobs.states import FINAL
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.faults import engine

SETTINGS = "[jobs]\ncpu_slots = {slots}\ncancel_grace_s = [1.0, 1.0]\n"
APP = "tests.faults.chaos"
ACTIONS = {"runner": 6, "engine": 8, "scheduler": 3, "app": 2, "cancel": 1, "resume": 3}


@dataclass
class Outcome:
    """What a run of chaos did and found.

    Attributes:
        done: How often each action hit something.
        states: Final states of the jobs.
        attempts: How many jobs needed how many attempts.
        problems: What must not be; empty if all is in order.
    """

    done: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    attempts: Counter[int] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def chaos(home: Home, n_jobs: int, seed: int, *, slots: int = 4, kills: int, limit_s: float) -> Outcome:
    """Run the jobs under fire and look at what is left.

    Args:
        home: A new home.
        n_jobs: How many jobs.
        seed: Of the choices of the driver; what they hit depends on timing.
        slots: Jobs at a time.
        kills: How many times something is done to the system, spread over the run; then the jobs are left in peace.
        limit_s: When to give up.
    """
    engine.prepare_home(home.root, SETTINGS.format(slots=slots))
    store, outcome, chance = JobStore(home), Outcome(), random.Random(seed)
    app = start_app(home, n_jobs)
    deadline = time.monotonic() + limit_s
    try:
        while time.monotonic() < deadline:
            if app.poll() is not None:
                app = start_app(home, n_jobs)
            jobs = store.jobs(limit=n_jobs + 1)
            ended = len(jobs) == n_jobs and all(job.state in FINAL for job in jobs)
            if ended and (outcome.done.total() >= kills or not any(job.state == "failed" for job in jobs)):
                break
            final = sum(job.state in FINAL for job in jobs)
            if outcome.done.total() < min(kills, slots + kills * final // n_jobs):  # no faster than the jobs get on
                (action,) = chance.choices(list(ACTIONS), weights=list(ACTIONS.values()))
                if act(action, home, app, jobs, chance):
                    outcome.done[action] += 1
            time.sleep(chance.uniform(0.05, 0.6))
        else:
            outcome.problems.append(f"not all jobs are final after {limit_s:.0f} s")
    finally:
        app.kill()
        app.wait()
    examine(home, n_jobs, outcome)
    return outcome


def act(action: str, home: Home, app: subprocess.Popen, jobs: list, chance: random.Random) -> bool:
    """One blow; returns whether there was something to hit."""
    if action == "app":
        app.kill()
        return True
    if action in ("cancel", "resume"):
        wanted = ("queued", "starting", "running") if action == "cancel" else ("failed", "cancelled")
        fitting = [job for job in jobs if job.state in wanted]
        if not fitting:
            return False
        with contextlib.suppress(QuantdeckError):  # it may have ended meanwhile
            getattr(control, action)(home, chance.choice(fitting).uid)
        return True
    words = {"scheduler": "backend.jobs.scheduler", "runner": "backend.jobs.runner", "engine": engine.MODULE}[action]
    found = sorted(processes(home, words))
    if action == "runner" and chance.random() < 0.5:  # in the middle of the work, where most is at stake
        found = sorted({pid for child in processes(home, engine.MODULE) if (pid := parent_of(child)) in found})
    if not found:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(found), signal.SIGKILL)
    return True


def parent_of(pid: int) -> int:
    """The parent of a process; 0 if it has ended."""
    try:
        return psutil.Process(pid).ppid()
    except psutil.Error:
        return 0


def processes(home: Home, module: str) -> list[int]:
    """Living processes of a program that work for this home."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        ours = any(word == str(home.root) or word.startswith(f"{home.root}/") for word in words)
        runs = words[1:3] == ["-m", module] and process.pid != os.getpid()
        if ours and runs and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.pid)
    return found


def examine(home: Home, n_jobs: int, outcome: Outcome, *, grace_s: float = doctor.GRACE_S) -> None:
    """Fill in how the jobs ended and what is wrong."""
    store = JobStore(home)
    jobs = store.jobs(limit=10 * n_jobs)
    outcome.states = Counter(job.state for job in jobs)
    outcome.attempts = Counter(job.attempt for job in jobs)
    names = {job.job_id for job in jobs}
    promised = (home.root / "submitted.txt").read_text().split()
    outcome.problems += [f"job {name} was submitted and is lost" for name in promised if name not in names]
    if len(jobs) != n_jobs:
        outcome.problems.append(f"there are {len(jobs)} jobs instead of {n_jobs}")
    begun = engine.starts(home.root)
    for (uid, attempt), times in Counter((uid, attempt) for uid, attempt, _, _ in begun).items():
        if times > 1:
            outcome.problems.append(f"attempt {attempt} of job {uid} was started {times} times")
    outcome.problems += [f"two engines of job {uid} at once, attempt {n}" for uid, n, _, overlap in begun if overlap]
    for job in jobs:
        if job.state == "succeeded" and not any(uid == job.uid for uid, *_ in begun):
            outcome.problems.append(f"job {job.job_id} succeeded without any work")
    for finding in doctor.examine(home, deep=True, grace_s=grace_s):
        outcome.problems += [f"doctor: {finding.check}: {problem.what}" for problem in finding.problems]
    outcome.problems += [f"lease {lease.resource} of job {lease.uid} is left" for lease in store.leases()]
    for module in ("backend.jobs.runner", engine.MODULE):
        outcome.problems += [f"process {pid} of {module} is left" for pid in processes(home, module)]


def end(home: Home) -> None:
    """Kill what a run has left, the idle scheduler above all."""
    for module in ("backend.jobs.scheduler", "backend.jobs.runner", engine.MODULE, APP):
        for pid in processes(home, module):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def start_app(home: Home, n_jobs: int) -> subprocess.Popen:
    """The stand-in for the dashboard; it dies with us."""
    command = [sys.executable, "-m", APP, "--app", "--jobs", str(n_jobs), "--home", str(home.root)]
    with open(home.root / "app.out", "ab") as out:
        return subprocess.Popen(
            command, cwd=PROJECT, stdout=out, stderr=out, env={**os.environ, **engine.environment()}
        )  # fmt: skip


def app_main(home: Home, n_jobs: int) -> None:
    """Submit the jobs that are not there yet, then keep watch as the dashboard does."""
    store, parent = JobStore(home), os.getppid()
    known = {job.job_id for job in store.jobs(limit=10 * n_jobs)}
    for number in range(n_jobs):
        name = f"chaos-{number:04d}"
        if name not in known:
            off = {"ENABLED": False}
            text = demo_text(name, EVALUATION=off, BENCHMARK=off)
            with contextlib.suppress(ConfigErrors):  # stored, but its runner died before it could say so
                store.create(text, parse_yaml(text).config, device="cpu")
                with open(home.root / "submitted.txt", "a") as file:
                    file.write(f"{name}\n")
        if number % 10 == 0:
            launch.watch(home)
    while os.getppid() == parent:
        launch.watch(home)
        time.sleep(0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="default: a new one, which is printed")
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which to give up")
    parser.add_argument("--home", type=Path, help="a new folder, kept afterwards (default: one that is removed)")
    parser.add_argument("--app", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.app:
        app_main(Home(arguments.home), arguments.jobs)
        return 0
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    os.environ.update(engine.environment())
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="quantdeck-chaos-") as folder:
        home = Home((arguments.home or Path(folder)).resolve())
        print(f"{arguments.jobs} jobs, seed {seed}, home {home.root}", flush=True)
        try:
            outcome = chaos(
                home, arguments.jobs, seed, slots=arguments.slots, kills=arguments.jobs, limit_s=arguments.limit
            )
        finally:
            end(home)
    print(f"{time.monotonic() - began:.0f} s; done to it: {dict(outcome.done)}")
    print(f"states {dict(outcome.states)}; attempts {dict(sorted(outcome.attempts.items()))}")
    for problem in outcome.problems:
        print(f"PROBLEM {problem}")
    print("FAILED" if outcome.problems else "all in order")
    return 1 if outcome.problems else 0


if __name__ == "__main__":
    sys.exit(main())
