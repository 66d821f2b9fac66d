"""The doctor: everything that must be true of a home, looked at from outside.

It reads `jobs.db`, `/proc` and the folders itself instead of asking the code that keeps them in order, so a mistake
there is found here. Jobs may run meanwhile: what looks wrong about something alive (a runner, a lease, a process) is
only told if it is still wrong after the time in which the scheduler would have put it right.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs import doctor_disk, launch
from backend.jobs.states import ACTIVE, FINAL, MOVES
from backend.jobs.store import JobStore
from backend.paths import HOME_VARIABLE, Home
from backend.process import lock_is_held

GRACE_S = 25.0
"""How long something alive may look wrong: a starting job has 20 s to show its runner."""
LOOK_EVERY_S = 0.5
SHOWN = 20  # problems of one check in the report
JOB_VARIABLE = "QUANTDECK_JOB"
AT_WORK = ("starting", "running", "cancelling")
MEND_COMMAND = "python -m backend doctor --mend"
LEGAL = {(source, target) for source, targets in MOVES.items() for target in targets}


@dataclass(frozen=True)
class Problem:
    """Something that should not be.

    Attributes:
        what: What was found, with names.
        mend: How to put it right.
        mended: Whether `examine(mend=True)` has done so.
    """

    what: str
    mend: str
    mended: bool = False


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        check: Name of the check.
        detail: What was looked at, when all is well.
        problems: What is wrong; empty if nothing.
    """

    check: str
    detail: str
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, or all of it was mended."""
        return all(problem.mended for problem in self.problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class Snapshot:
    """`jobs.db` at one moment."""

    jobs: dict[str, dict[str, Any]]
    events: list[dict[str, Any]]
    leases: list[dict[str, Any]]
    instances: list[dict[str, Any]]

    def at_work(self, uid: str, attempt: int) -> bool:
        """Whether this very attempt is one that has a runner."""
        job = self.jobs.get(uid)
        return job is not None and job["attempt"] == attempt and job["state"] in AT_WORK


Suspects = dict[tuple[Any, ...], Problem]


def examine(home: Home, *, deep: bool = False, mend: bool = False, grace_s: float = GRACE_S) -> list[Finding]:
    """Check everything.

    Args:
        home: The home.
        deep: Also read every published file and compare its sha256, which takes as long as reading them does.
        mend: Put right what is safe to: stale leases, leftover temporary folders, permissions, a missing scheduler.
        grace_s: How long to wait for the scheduler to put right what is alive.
    """
    findings = [_settings(home)]
    if mend and home.jobs_db.exists():
        findings += _mend_alive(home)
    store, snapshot = _store(home)
    findings.append(store)
    if snapshot is not None:
        findings += [_states(snapshot), _history(snapshot)]
        findings += _alive(home, grace_s)
        latest = _read(home, results=True)  # what the scheduler has changed meanwhile is final now
        jobs = list(latest.jobs.values())
        findings.append(_finding("results", *doctor_disk.results(home, jobs, deep=deep)))
        findings.append(_finding("half-published", *doctor_disk.half_published(home, jobs)))
        findings.append(_finding("run folders", *doctor_disk.run_folders(home, jobs, mend=mend)))
    findings.append(_finding("disk", *doctor_disk.disk(home)))
    findings.append(_finding("permissions", *doctor_disk.permissions(home, mend=mend)))
    findings.append(_finding("accounts", *doctor_disk.readable_accounts(home)))
    findings.append(_finding("environments", *doctor_disk.engine_environments()))
    return findings


def report(findings: list[Finding]) -> str:
    """One line per check, and two per problem."""
    lines = []
    for finding in findings:
        told = f" ({finding.detail})" if finding.detail else ""
        if not finding.problems:
            lines.append(f"ok       {finding.check}{told}")
        for problem in finding.problems[:SHOWN]:
            if problem.mended:
                lines.append(f"mended   {finding.check}: {problem.what}")
            else:
                lines += [f"PROBLEM  {finding.check}: {problem.what}", f"         to mend: {problem.mend}"]
        if len(finding.problems) > SHOWN:
            lines.append(f"         and {len(finding.problems) - SHOWN} more of {finding.check}; --json tells all")
    return "\n".join(lines)


def _finding(check: str, detail: str, problems: list[tuple[str, str, bool]]) -> Finding:
    return Finding(check, detail, tuple(Problem(*problem) for problem in problems))


def _settings(home: Home) -> Finding:
    from backend.settings import FILE_NAME, Settings

    try:
        Settings.load(home)
    except QuantdeckError as error:
        return Finding("settings", "", (Problem(error.message, f"edit {home.root / FILE_NAME}"),))
    return Finding("settings", FILE_NAME if (home.root / FILE_NAME).exists() else "defaults")


# -- the job store


def _store(home: Home) -> tuple[Finding, Snapshot | None]:
    """The file itself: readable, sound, of this version, with the journal that it should have."""
    if not home.jobs_db.exists():
        return Finding("job store", "there is none yet"), None
    restore = f"put back a backup of {home.jobs_db} (see docs/operations.md), and keep this file"
    try:
        store = JobStore(home)
        problems = [Problem(what, f"{MEND_COMMAND}; if that does not help, {restore}") for what in store.check()]
        wanted = store.journal()
        with _connect(home) as db:
            mode = str(db.execute("PRAGMA journal_mode").fetchone()[0])
            for row in db.execute("PRAGMA foreign_key_check"):
                problems.append(Problem(f"a row of {row[0]} belongs to no job", restore))
        if mode == "wal" and wanted != "wal":
            why = f"journal mode is {mode}, which is not safe with this SQLite ({sqlite3.sqlite_version})"
            problems.append(
                Problem(why, f"stop everything, then: sqlite3 {home.jobs_db} 'PRAGMA journal_mode={wanted}'")
            )
        snapshot = _read(home)
    except QuantdeckError as error:
        return Finding("job store", "", (Problem(error.message, restore),)), None
    except sqlite3.Error as error:
        return Finding("job store", "", (Problem(f"{home.jobs_db} cannot be read: {error}", restore),)), None
    detail = f"{len(snapshot.jobs)} jobs, integrity_check passed, journal {mode}, SQLite {sqlite3.sqlite_version}"
    return Finding("job store", detail, tuple(problems)), snapshot


@contextlib.contextmanager
def _connect(home: Home, mode: str = "ro") -> Iterator[sqlite3.Connection]:
    connection = sqlite3.connect(f"{home.jobs_db.as_uri()}?mode={mode}", uri=True, timeout=30.0, isolation_level=None)
    connection.row_factory = sqlite3.Row
    try:
        yield connection
    finally:
        connection.close()


def _read(home: Home, *, results: bool = False) -> Snapshot:
    """All tables in one read transaction; the jobs' results only if they are asked for, since they are large."""
    columns = "uid, job_id, folder, device, state, attempt, artefact, stalled" + (", result" if results else "")
    with _connect(home) as db:
        db.execute("BEGIN")
        jobs = [dict(row) for row in db.execute(f"SELECT {columns} FROM jobs ORDER BY uid")]
        events, leases, instances = (
            [dict(row) for row in db.execute(f"SELECT * FROM {table}")]
            for table in ("job_events ORDER BY id", "leases", "instances")
        )
        db.execute("COMMIT")
    return Snapshot({job["uid"]: job for job in jobs}, events, leases, instances)


def _states(snapshot: Snapshot) -> Finding:
    states = {*ACTIVE, *FINAL}
    counts: dict[str, int] = {}
    for job in snapshot.jobs.values():
        counts[job["state"]] = counts.get(job["state"], 0) + 1
    problems = tuple(
        Problem(f"job {_name(job)} is in the unknown state {job['state']!r}", "put back a backup of jobs.db")
        for job in snapshot.jobs.values()
        if job["state"] not in states
    )
    return Finding("states", ", ".join(f"{n} {state}" for state, n in sorted(counts.items())), problems)


def _history(snapshot: Snapshot) -> Finding:
    """Every job's events lead, by legal moves, from its first `queued` to the state and attempt that it is in."""
    at: dict[str, tuple[str, int]] = {}
    problems = []
    for event in snapshot.events:
        job = snapshot.jobs.get(event["uid"])
        if job is None:
            problems.append(f"event {event['id']} is of the unknown job {event['uid']}")
            continue
        state, attempt = at.get(event["uid"], (None, 0))
        came, to = event["from_state"], event["to_state"]
        if came != state or (came is None and to != "queued") or (came is not None and (came, to) not in LEGAL):
            problems.append(f"job {_name(job)} went from {came or 'nothing'} to {to}, but it was {state or 'new'}")
        elif event["attempt"] != attempt + (to == "queued"):
            problems.append(f"job {_name(job)} became {to} in attempt {event['attempt']}, after attempt {attempt}")
        at[event["uid"]] = (to, event["attempt"])
    for uid, job in snapshot.jobs.items():
        if at.get(uid) != (job["state"], job["attempt"]):
            last = "{} in attempt {}".format(*at[uid]) if uid in at else "nothing"
            problems.append(
                f"job {_name(job)} is {job['state']}, attempt {job['attempt']}; its history ends with {last}"
            )
    mend = "put back a backup of jobs.db, or cancel and clone the job"
    return Finding("history", f"{len(snapshot.events)} moves", tuple(Problem(what, mend) for what in problems))


# -- what is alive


def _alive(home: Home, grace_s: float) -> list[Finding]:
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
        snapshot = _read(home)
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
            what = f"job {_name(job)} lost its runner and was not queued again"
            suspects[job["uid"], job["attempt"]] = Problem(what, MEND_COMMAND)
        if job["state"] not in AT_WORK:
            continue
        working += 1
        if not lock_is_held(home.run_dir(job["uid"]) / "runner.lock"):
            if job["state"] == "starting" and (job["uid"], job["attempt"]) in present:
                continue  # on a busy machine a runner may take minutes to come up
            what = f"job {_name(job)} is {job['state']}, but its runner is gone"
            suspects[job["uid"], job["attempt"]] = Problem(what, MEND_COMMAND)
        elif job["stalled"]:
            what = f"the runner of job {_name(job)} lives, but has not moved for a minute or more"
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
            name = _name(snapshot.jobs[uid]) if uid in snapshot.jobs else f"{uid}, which is not in jobs.db"
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
        whose = f"attempt {lease['attempt']} of job {_name(job) if job else lease['uid']}"
        what = f"{lease['resource']} is taken by {whose}, which is not at work"
        suspects[lease["resource"], lease["uid"], lease["attempt"]] = Problem(what, MEND_COMMAND)
    for job in snapshot.jobs.values():
        if job["state"] not in AT_WORK:
            continue
        kind = "cpu:" if job["device"] == "cpu" else "gpu:"
        needed = 1 if kind == "cpu:" else job["device"].count(",") + 1
        has = [name for name in held.get(job["uid"], []) if name.startswith(kind)]
        if len(has) != needed:
            what = f"job {_name(job)} is {job['state']} on {job['device']}, but holds {', '.join(has) or 'nothing'}"
            mend = f"python -m backend cancel {job['job_id']}, then resume it"
            suspects[job["uid"], job["attempt"], "needs"] = Problem(what, mend)
    return f"{len(snapshot.leases)} held", suspects


def _mend_alive(home: Home) -> list[Finding]:
    """Drop leases that nobody can own, and start a scheduler if there is work for one; it does the rest."""
    states = ", ".join(f"'{state}'" for state in AT_WORK)
    try:
        JobStore(home).counts()  # an error if the store is of a newer version, which is not ours to change
        with _connect(home, "rw") as db:
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


def _name(job: dict[str, Any]) -> str:
    return f"{job['job_id']} ({job['uid']})"
