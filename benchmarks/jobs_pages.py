"""How fast the pages of a dashboard with much to show answer: the list of jobs, and a log in many tabs."""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import threading
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import psutil

from backend.jobs import control
from backend.jobs.states import FINAL
from backend.jobs.store import JobStore
from backend.paths import Home
from benchmarks import report
from benchmarks.jobs_common import Row, create, fill, row, until
from tests.dashboard import free_port, start_app
from tests.faults import engine
from tests.faults.browser import Calls, listed

LISTED, LOADS = 10_000, 100
TABS, LINES_PER_S, EVERY_S = 50, 1000, 1.0


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
