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
import asyncio
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from backend.jobs import control, launch
from backend.jobs.events import read_lines
from backend.jobs.states import FINAL
from backend.jobs.store import Job, JobStore
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from benchmarks import report
from tests.conftest import demo_text
from tests.dashboard import free_port, start_app
from tests.faults import engine
from tests.faults.browser import Calls, listed
from tests.faults.chaos import end

COLUMNS = ("measured", "median", "p95", "largest")
STARTS, DEATHS = 7, 7
CLAIMERS, CLAIMED = 8, 1000
LISTED, LOADS = 10_000, 100
TABS, LINES_PER_S, EVERY_S = 50, 1000, 1.0
OFF = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}

Row = dict[str, Any]


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


@contextmanager
def own_home(settings: str = "[jobs]\ncpu_slots = 2\n") -> Iterator[Home]:
    """A home for one part; what works for it is killed at the end."""
    with tempfile.TemporaryDirectory(prefix="quantdeck-bench-") as folder:
        home = Home(Path(folder).resolve() / "home")
        engine.prepare_home(home.root, settings)
        try:
            yield home
        finally:
            end(home)


def row(what: str, values: list[float], unit: str, note: str = "") -> Row:
    """The order statistics of some measured values."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {
        "what": f"{what} ({len(values)})", "median": at(0.5), "p95": at(0.95), "largest": ordered[-1], "unit": unit,
        "note": note,
    }  # fmt: skip


def cells(one: Row) -> list[str]:
    """A row of the table as text."""
    shown = [f"{one[name]:.0f}" if one[name] >= 100 else f"{one[name]:.3g}" for name in ("median", "p95", "largest")]
    return [one["what"], *(f"{number} {one['unit']}" for number in shown)]


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError("this took too long; the benchmark stops")
        time.sleep(0.01)
    return found


def text_of(name: str, **more: Any) -> str:
    """A job file without measurements."""
    return demo_text(name, **OFF, **more)


def create(home: Home, name: str, **more: Any) -> Job:
    """A queued job, and a scheduler that sees it."""
    text = text_of(name, **more)
    job = JobStore(home).create(text, parse_yaml(text).config, device="cpu")
    launch.ensure_scheduler(home)
    return job


# -- the parts


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


def fill(home: Home, count: int, state: str) -> None:
    """Copies of one job, written at once: through `create` the syncs of the disk alone would take minutes."""
    store = JobStore(home)
    text = text_of("first")
    first = store.create(text, parse_yaml(text).config, device="cpu")
    result = json.dumps(
        {
            "artefact": "/nowhere", "model_dir": "/nowhere",
            "rows": [
                {
                    "metric": "perplexity", "name": f"Perplexity {n}", "baseline": 2.5, "quantized": 2.6, "impact": 0.1,
                    "interval": [0.0, 0.2], "unit": "", "higher_is_better": False, "protocol": "benchmark",
                }
                for n in range(6)
            ],
            "layers": [{"layer": f"model.layers.{n}", "error": 0.01, "rtn_error": 0.02} for n in range(32)],
        }
    )  # fmt: skip
    done = state in FINAL
    with sqlite3.connect(home.jobs_db, isolation_level=None) as db:
        db.row_factory = sqlite3.Row
        one = dict(db.execute("SELECT * FROM jobs").fetchone())
        columns = ", ".join(one)
        marks = ", ".join(f":{name}" for name in one)
        db.execute("BEGIN")
        for number in range(1, count):
            uid = f"{int(first.uid[:12], 16) + number:012x}{number:010x}"
            times = (
                {"started_at": one["created_at"], "finished_at": one["created_at"], "result": result} if done else {}
            )
            new = {"uid": uid, "job_id": f"job-{number:05d}", "folder": f"x/{number}", "state": state, **times}
            db.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", {**one, **new})
            query = (
                "INSERT INTO job_events (uid, attempt, from_state, to_state, actor, at) VALUES (?, 1, NULL, ?, ?, ?)"
            )
            db.execute(query, [uid, "queued", "user", one["created_at"]])
        db.execute("COMMIT")
    db.close()


def job_list(home: Home, arguments: argparse.Namespace) -> list[Row]:
    """The list of jobs over HTTP."""
    fill(home, LISTED, "succeeded")
    JobStore(home).move(JobStore(home).jobs(limit=1, offset=LISTED - 1)[0].uid, "cancelled", actor="user", attempt=1)
    url, dashboard = running_app(home)
    loads, refreshes, size = [], [], 0
    with httpx.Client(base_url=url, headers={"origin": url}, timeout=60) as http:
        config = http.get("/config").json()
        for number in range(LOADS + 5):
            calls = Calls.of(config)
            before = time.monotonic()
            answer = http.post(calls.load_jobs()[0], json=calls.load_jobs()[1])
            between = time.monotonic()
            http.post(calls.refresh_jobs()[0], json=calls.refresh_jobs()[1]).raise_for_status()
            if number >= 5:
                loads.append(1000 * (between - before))
                refreshes.append(1000 * (time.monotonic() - between))
            page = listed(answer)
            size = len(page)
            if f"job-{LISTED - 1:05d}" not in page:
                raise RuntimeError("the list does not show the newest job")
    rss = psutil.Process(dashboard.pid).memory_info().rss
    dashboard.kill()
    dashboard.wait()
    note = f"HTTP to app.py, {LISTED} jobs, one client; {size / 1000:.0f} kB of HTML"
    return [
        row("list of jobs, first load", loads, "ms", note),
        row("list of jobs, refresh", refreshes, "ms", f"dashboard RSS {report.megabytes(rss)} MB"),
    ]


def running_app(home: Home) -> tuple[str, subprocess.Popen[bytes]]:
    """A dashboard of this home and its address."""
    port = free_port()
    return f"http://127.0.0.1:{port}", start_app(home, port, dict(os.environ))


def log_tail(home: Home, arguments: argparse.Namespace) -> list[Row]:
    """50 tabs and a log that grows."""
    (home.root / "hold").touch()
    url, dashboard = running_app(home)
    job = create(home, "long")
    until(lambda: engine.starts(home.root))
    log = control.log_path(home, job.uid)
    rss = psutil.Process(dashboard.pid).memory_info
    stop = threading.Event()
    written: list[int] = []
    writer = threading.Thread(target=write_lines, args=(log, stop, written), daemon=True)
    asyncio.run(tabs(url, job.uid, 3.0))  # warms up what is only made once
    before = rss().rss
    writer.start()
    clock, own, others = time.monotonic(), time.process_time(), cpu_seconds(dashboard.pid)
    answers, gaps, cut, got, bodies = asyncio.run(tabs(url, job.uid, arguments.seconds))
    stop.set()
    writer.join()
    wall, own, others = time.monotonic() - clock, time.process_time() - own, cpu_seconds(dashboard.pid) - others
    after = rss().rss
    still = JobStore(home).get(job.uid).state  # the tabs are closed now
    (home.root / "hold").unlink()
    ended = until(lambda: (found := JobStore(home).get(job.uid)).state in FINAL and found)
    time.sleep(2)
    settled = rss().rss
    dashboard.kill()
    dashboard.wait()
    lines = (
        f"{sum(written) / wall:.0f} lines/s written; {got} lines to {TABS} tabs in {bodies / 1e6:.0f} MB, {gaps} lines "
        f"missing, {cut} left out and told so; CPU: dashboard {100 * others / wall:.0f} %, tabs {100 * own / wall:.0f} "
        "% of a core"
    )
    memory = (
        f"RSS {report.megabytes(before)} MB before, {report.megabytes(after)} after, {report.megabytes(settled)} 2 s "
        f"later; job {still} after all tabs closed, then {ended.state}"
    )
    return [
        row(f"{TABS} tabs: new lines of a log", answers, "ms", lines),
        {"what": "dashboard with these tabs", "note": memory},
    ]


def write_lines(log: Path, stop: threading.Event, written: list[int]) -> None:
    """Numbered lines at a steady rate, ten batches a second."""
    began, number = time.monotonic(), 0
    with open(log, "a", encoding="utf-8") as file:
        while not stop.wait(0.1):
            due = int((time.monotonic() - began) * LINES_PER_S)
            file.write("".join(f"line {n:09d} {'x' * 80}\n" for n in range(number, due)))
            file.flush()
            written.append(due - number)
            number = due


def cpu_seconds(pid: int) -> float:
    """What a process has used up."""
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


async def tabs(url: str, uid: str, seconds: float) -> tuple[list[float], int, int, int, int]:
    """Open pages that ask for new lines; returns milliseconds of each answer, and missing, cut, got lines and bytes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=TABS)
    async with httpx.AsyncClient(base_url=url, headers={"origin": url}, timeout=60, limits=limits) as http:
        config = (await http.get("/config")).json()
        found = await asyncio.gather(*(tab(http, config, uid, seconds, n) for n in range(TABS)))
    times = [time for one in found for time in one[0]]
    missing, cut, got, size = (sum(one[n] for one in found) for n in (1, 2, 3, 4))
    return times, missing, cut, got, size


async def tab(
    http: httpx.AsyncClient, config: dict[str, Any], uid: str, seconds: float, number: int
) -> tuple[list[float], int, int, int, int]:
    """One page: asks, looks whether a line is missing, waits."""
    await asyncio.sleep(number / TABS * EVERY_S)  # people do not open their pages at once
    calls, cursor, last = Calls.of(config), None, None
    times, missing, cut, got, size = [], 0, 0, 0, 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        path, body = calls.log(uid, cursor)
        before = time.monotonic()
        answer = await http.post(path, json=body)
        times.append(1000 * (time.monotonic() - before))
        answer.raise_for_status()
        size += len(answer.content)
        found = answer.json()
        if "error" in found:
            raise RuntimeError(found["error"])
        cursor = found["cursor"]
        numbers = [int(line.split()[1]) for line in found["lines"] if line.startswith("line ")]
        if numbers:
            skipped = numbers[0] - last - 1 if last is not None else 0
            missing += abs(skipped - found["cut"]) if last is not None else 0
            missing += sum(after != before + 1 for before, after in pairwise(numbers))
            cut += found["cut"] if last is not None else 0
            last = numbers[-1]
        got += len(numbers)
        await asyncio.sleep(EVERY_S)
    return times, missing, cut, got, size


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
