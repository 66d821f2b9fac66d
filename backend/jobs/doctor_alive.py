"""The doctor's look at what is alive: the scheduler, runners, processes of jobs, leases.

What looks wrong is only told if it still is after the time in which the scheduler would have put it right.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs import launch
from backend.jobs.doctor_findings import MEND_COMMAND, Finding, Problem
from backend.jobs.doctor_store import AT_WORK, Snapshot, connect, name_of, read_tables
from backend.jobs.states import ACTIVE
from backend.jobs.store import JobStore
from backend.paths import HOME_VARIABLE, Home
from backend.process import lock_is_held

LOOK_EVERY_S = 0.5
JOB_VARIABLE = "QUANTDECK_JOB"

Suspects = dict[tuple[Any, ...], Problem]


def examine_alive(home: Home, grace_s: float) -> list[Finding]:
    """Runners, processes, leases and the scheduler; what is wrong must stay wrong for `grace_s`."""
    checks: dict[str, Callable[[Home, Snapshot], tuple[str, Suspects]]] = {
        "scheduler": _scheduler,
        "runners": _runners,
        "processes": _processes,
        "leases": _leases,
    }
    deadline = time.monotonic() + grace_s
    kept: dict[str, Suspects] | None = None
    while True:
        snapshot = read_tables(home)
        seen = {name: check(home, snapshot) for name, check in checks.items()}
        kept = {
            name: {key: problem for key, problem in suspects.items() if kept is None or key in kept[name]}
            for name, (_, suspects) in seen.items()
        }
        if not any(kept.values()) or time.monotonic() >= deadline:
            return [Finding(name, seen[name][0], tuple(kept[name].values())) for name in checks]
        time.sleep(LOOK_EVERY_S)


def _scheduler(home: Home, snapshot: Snapshot) -> tuple[str, Suspects]:
    """One leader if there is work, and its row in `instances`."""
    active = sum(job["state"] in ACTIVE for job in snapshot.jobs.values())
    held = lock_is_held(home.private / "scheduler.lock")
    living = [i for i in snapshot.instances if i["kind"] == "scheduler" and instance_lives(i)]
    suspects: Suspects = {}
    if active and not held:
        suspects["none",] = Problem(f"{active} jobs are active and no scheduler is running", MEND_COMMAND)
    if held and not living:
        what = "a process holds the scheduler's lock, but no living scheduler is in the table `instances`"
        suspects["unknown",] = Problem(what, f"find it with: fuser {shlex.quote(str(home.private / 'scheduler.lock'))}")
    pids = ", ".join(str(i["pid"]) for i in living)
    return (f"process {pids}" if held else "none running, none needed"), suspects


def _runners(home: Home, snapshot: Snapshot) -> tuple[str, Suspects]:
    """A job at work has a runner that holds its lock, and the runner lets its heart beat."""
    suspects: Suspects = {}
    working = 0
    present = {(uid, attempt) for _, uid, attempt, _ in marked_processes(home, set(snapshot.jobs))}
    for job in snapshot.jobs.values():
        if job["state"] == "lost":
            what = f"job {name_of(job)} lost its runner and was not queued again"
            suspects[job["uid"], job["attempt"]] = Problem(what, MEND_COMMAND)
        if job["state"] not in AT_WORK:
            continue
        working += 1
        if not lock_is_held(home.run_dir(job["uid"]) / "runner.lock"):
            if job["state"] == "starting" and (job["uid"], job["attempt"]) in present:
                continue  # on a busy machine a runner may take minutes to come up
            what = f"job {name_of(job)} is {job['state']}, but its runner is gone"
            suspects[job["uid"], job["attempt"]] = Problem(what, MEND_COMMAND)
        elif job["stalled"]:
            what = f"the runner of job {name_of(job)} lives, but has not moved for a minute or more"
            mend = f"look at its log; to end it: python -m backend cancel {job['job_id']}"
            suspects[job["uid"], job["attempt"], "stalled"] = Problem(what, mend)
    return f"{working} at work", suspects


def _processes(home: Home, snapshot: Snapshot) -> tuple[str, Suspects]:
    """No process of a job outlives the attempt that it was started for."""
    suspects: Suspects = {}
    found = 0
    for pid, uid, attempt, command in marked_processes(home, set(snapshot.jobs)):
        found += 1
        if not snapshot.at_work(uid, attempt):
            name = name_of(snapshot.jobs[uid]) if uid in snapshot.jobs else f"{uid}, which is not in jobs.db"
            what = f"process {pid} ({command}) was started for attempt {attempt} of job {name}, which has ended"
            suspects[pid, uid, attempt] = Problem(what, f"kill {pid}")
    return f"{found} of jobs", suspects


def _leases(home: Home, snapshot: Snapshot) -> tuple[str, Suspects]:
    """A job at work holds what its device needs, nobody else holds anything."""
    suspects: Suspects = {}
    held: dict[str, list[str]] = {}
    for lease in snapshot.leases:
        if snapshot.at_work(lease["uid"], lease["attempt"]):
            held.setdefault(lease["uid"], []).append(lease["resource"])
            continue
        job = snapshot.jobs.get(lease["uid"])
        whose = f"attempt {lease['attempt']} of job {name_of(job) if job else lease['uid']}"
        what = f"{lease['resource']} is taken by {whose}, which is not at work"
        suspects[lease["resource"], lease["uid"], lease["attempt"]] = Problem(what, MEND_COMMAND)
    for job in snapshot.jobs.values():
        if job["state"] not in AT_WORK:
            continue
        kind = "cpu:" if job["device"] == "cpu" else "gpu:"
        needed = 1 if kind == "cpu:" else job["device"].count(",") + 1
        has = [name for name in held.get(job["uid"], []) if name.startswith(kind)]
        if len(has) != needed:
            what = f"job {name_of(job)} is {job['state']} on {job['device']}, but holds {', '.join(has) or 'nothing'}"
            mend = f"python -m backend cancel {job['job_id']}, then resume it"
            suspects[job["uid"], job["attempt"], "needs"] = Problem(what, mend)
    return f"{len(snapshot.leases)} held", suspects


def mend_alive(home: Home) -> list[Finding]:
    """Drop leases that nobody can own, and start a scheduler if there is work for one; it does the rest."""
    states = ", ".join(f"'{state}'" for state in AT_WORK)
    try:
        JobStore(home).counts()  # an error if the store is of a newer version, which is not ours to change
        with connect(home, "rw") as db:
            db.execute("BEGIN IMMEDIATE")
            rows = db.execute(
                "DELETE FROM leases WHERE NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.uid = leases.uid "
                f"AND jobs.attempt = leases.attempt AND jobs.state IN ({states})) RETURNING resource, uid"
            ).fetchall()
            db.execute("COMMIT")
        launch.watch(home)
    except (QuantdeckError, sqlite3.Error):
        return []  # the check of the job store tells why
    problems = [Problem(f"{resource} was taken by job {uid}, which is not at work", "", True) for resource, uid in rows]
    return [Finding("leases", "", tuple(problems))] if problems else []


def marked_processes(home: Home, uids: set[str]) -> Iterator[tuple[int, str, int, str]]:
    """This user's processes that carry the mark of a job of this home: pid, uid, attempt, command."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        try:
            if folder.stat().st_uid != os.getuid():
                continue
            environment = dict(
                item.split("=", 1) for item in (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                if "=" in item
            )  # fmt: skip
            command = (folder / "comm").read_text().strip()
        except OSError:
            continue  # it has ended meanwhile
        uid, _, attempt = environment.get(JOB_VARIABLE, "").partition(":")
        ours = environment.get(HOME_VARIABLE) == str(home.root) if HOME_VARIABLE in environment else uid in uids
        if uid and ours and attempt.isdigit():
            yield int(folder.name), uid, int(attempt), command


def instance_lives(instance: dict[str, Any]) -> bool:
    """Whether the process of a row of `instances` is still that process."""
    try:
        text = Path(f"/proc/{instance['pid']}/stat").read_text()
    except OSError:
        return False
    fields = text.rpartition(")")[2].split()
    started = instance["started"]
    return fields[0] != "Z" and (started is None or str(started) == fields[19])
