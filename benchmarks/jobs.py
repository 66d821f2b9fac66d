"""The job system: how soon a job starts, how many can be claimed, how fast the pages answer, how soon a death is seen.

    python -m benchmarks.jobs [--only start claims list log death] [--seconds 60] [--json FILE]

Real store, scheduler, runner and dashboard (`app.py` on a loopback port); only the work itself is a stand-in that
imports nothing heavy (`tests/faults/engine.py`). Every part has a home of its own in a temporary folder.

start   From the call of `submit` (which checks the job file and its model) to the first event of the engine, with the
        scheduler already running and with the scheduler to be started.
claims  8 processes try to get each of 1,000 queued jobs, all in the same order.
list    The list of jobs over HTTP, first load and refresh, with 10,000 jobs in the store.
log     50 open pages ask for new lines every second while the log grows by 1,000 lines a second.
death   From kill -9 of a runner to the state `lost` in the store.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from backend.jobs import control
from backend.jobs.events import read_lines
from backend.jobs.states import FINAL
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from benchmarks import report
from benchmarks.jobs_common import Row, cells, create, fill, own_home, row, text_of, until
from benchmarks.jobs_pages import job_list, log_tail
from tests.faults import engine
from tests.faults.chaos import end

COLUMNS = ("measured", "median", "p95", "largest")
STARTS, DEATHS = 7, 7
CLAIMERS, CLAIMED = 8, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=60.0, help="how long the log grows")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--claim", nargs=2, metavar=("HOME", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.claim:
        claim(Home(Path(arguments.claim[0])), Path(arguments.claim[1]))
        return
    os.environ.update(engine.environment())
    facts = report.machine()
    store_facts = f"SQLite {sqlite3.sqlite_version}"
    print(f"{report.header(facts)}, {store_facts}", flush=True)
    rows: list[Row] = []
    for name in arguments.only:
        print(f"  {name} ...", file=sys.stderr, flush=True)
        with own_home() as home:
            rows += PARTS[name](home, arguments)
    print()
    print(report.table(COLUMNS, [cells(one) for one in rows if "median" in one]), end="\n\n")
    print("\n".join(f"{one['what']}: {one['note']}" for one in rows if one["note"]))
    report.write(arguments.json, {**facts, "load_after": os.getloadavg()}, rows)


def starts(home: Home, arguments: argparse.Namespace) -> list[Row]:
    """Submit to first event."""
    rows = []
    for what, cold in (
        ("submit to first event, scheduler running", False),
        ("the same, scheduler to be started", True),
    ):
        seconds = []
        for number in range(STARTS + 1):
            if cold:
                end(home)
            began = time.monotonic()
            job = control.submit(home, text_of(f"{'cold' if cold else 'warm'}-{number}"))
            events = control.events_file(home, job.uid)
            until(lambda events=events: read_lines(events)[0])
            seconds.append(time.monotonic() - began)
            until(lambda uid=job.uid: JobStore(home).get(uid).state in FINAL)
        rows.append(row(what, seconds[1:], "s"))  # the first one warms the caches of the disk
    return rows


def claims(home: Home, arguments: argparse.Namespace) -> list[Row]:
    """Many claimers, each job claimed once."""
    store = JobStore(home)
    fill(home, CLAIMED, "queued")
    commands = [
        [sys.executable, "-m", "benchmarks.jobs", "--claim", str(home.root), str(home.root / f"claims-{number}.json")]
        for number in range(CLAIMERS)
    ]
    processes = [subprocess.Popen(command, cwd=PROJECT) for command in commands]
    until(lambda: all((home.root / f"claims-{n}.json.ready").exists() for n in range(CLAIMERS)))
    (home.root / "go").touch()
    for process in processes:
        if process.wait(600):
            raise RuntimeError("a claimer failed")
    results = [json.loads((home.root / f"claims-{n}.json").read_text()) for n in range(CLAIMERS)]
    won = [uid for result in results for uid in result["won"]]
    seconds = max(r["ended"] for r in results) - min(r["began"] for r in results)
    with sqlite3.connect(home.jobs_db) as db:
        (moves,) = db.execute("SELECT count(*) FROM job_events WHERE to_state = 'starting'").fetchone()
    db.close()
    waits = [wait for result in results for wait in result["waits"]]
    note = (
        f"{len(won) / seconds:.0f} claims/s, {len(won) - len(set(won))} duplicates, {moves} starts of "
        f"{CLAIMED} jobs, {sum(r['errors'] for r in results)} errors, journal {store.journal()}"
    )
    return [row(f"a claim, {CLAIMERS} claimers at once", waits, "ms", note)]


def claim(home: Home, out: Path) -> None:
    """One claimer: wait for the others, then try to get every job."""
    store, won, waits, errors = JobStore(home), [], [], 0
    jobs = sorted(job.uid for job in store.summaries(states=("queued",), limit=CLAIMED))
    out.with_name(f"{out.name}.ready").touch()
    until(lambda: (home.root / "go").exists())
    began = time.monotonic()
    for number, uid in enumerate(jobs):
        before = time.monotonic()
        try:
            if store.grant(uid, 1, [f"cpu:{number}"]):
                won.append(uid)
                waits.append(1000 * (time.monotonic() - before))
        except Exception as error:
            print(error, file=sys.stderr)
            errors += 1
    out.write_text(
        json.dumps({"won": won, "waits": waits, "errors": errors, "began": began, "ended": time.monotonic()})
    )


def deaths(home: Home, arguments: argparse.Namespace) -> list[Row]:
    """From kill -9 of a runner to `lost`."""
    (home.root / "hold").touch()
    job, store, seconds = create(home, "mortal", MAX_ATTEMPTS=10), JobStore(home), []
    for attempt in range(1, DEATHS + 1):
        facts = home.run_dir(job.uid) / "runner.json"

        def ready(attempt: int = attempt) -> bool:
            return any(n == attempt for _, n, _, _ in engine.starts(home.root))

        until(ready)
        pid = json.loads(facts.read_text())["pid"]
        engine_pid = next(pid for _, n, pid, _ in engine.starts(home.root) if n == attempt)
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        until(
            lambda attempt=attempt: any(
                e["to_state"] == "lost" and e["attempt"] == attempt for e in store.history(job.uid)
            )
        )
        seconds.append(time.monotonic() - began)
        if psutil.pid_exists(engine_pid) and psutil.Process(engine_pid).status() != psutil.STATUS_ZOMBIE:
            raise RuntimeError("the engine was still alive when its job was lost")
    return [row("kill -9 of a runner to `lost`", seconds, "s", "its engine was gone by then, every time")]


PARTS: dict[str, Callable[[Home, argparse.Namespace], list[Row]]] = {
    "start": starts,
    "claims": claims,
    "list": job_list,
    "log": log_tail,
    "death": deaths,
}


if __name__ == "__main__":
    main()
