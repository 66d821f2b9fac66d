"""Killing the dashboard while jobs run (faults 3 and 4): they go on, and a new dashboard shows the same jobs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time

import httpx
import pytest

from backend.jobs import control
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.dashboard import free_port, start_app
from tests.faults import engine
from tests.faults.browser import Calls, listed
from tests.faults.chaos import end

SETTINGS = "[jobs]\ncpu_slots = 2\n"


@pytest.fixture
def home(tmp_path):
    home = Home(tmp_path / "home")
    engine.prepare_home(home.root, SETTINGS)
    yield home
    end(home)


@pytest.fixture
def app(home):
    """Starts dashboards on one port; whatever is left of them is killed."""
    started: list[subprocess.Popen] = []
    environment = {**os.environ, **engine.environment()}
    port = free_port()

    def start():
        started.append(start_app(home, port, environment))
        return started[-1], f"http://127.0.0.1:{port}"

    yield start
    for process in started:
        process.kill()
        process.wait()


def create(home, name):
    off = {"ENABLED": False}
    text = demo_text(name, EVALUATION=off, BENCHMARK=off)
    return JobStore(home).create(text, parse_yaml(text).config, device="cpu")


def until(condition, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "this did not come true in time"
        time.sleep(0.1)
    return found


def at_work(home, jobs):
    """The engine's pid of each job, once all of them are in the middle of their work."""
    pids = {uid: pid for uid, _, pid, _ in engine.starts(home.root)}
    store = JobStore(home)
    return pids if all(j.uid in pids and store.get(j.uid).state == "running" for j in jobs) else None


def runners(home, jobs):
    return {job.uid: json.loads((home.run_dir(job.uid) / "runner.json").read_text()) for job in jobs}


@contextlib.contextmanager
def open_page(url):
    """The connection that every open page keeps."""
    with httpx.Client(base_url=url, timeout=60) as http, http.stream("GET", "/gradio_api/heartbeat/a-tab") as stream:
        stream.raise_for_status()
        next(stream.iter_raw())
        yield


def shown(url):
    """What the list of jobs of a running dashboard says."""
    with httpx.Client(base_url=url, headers={"origin": url}, timeout=60) as http:
        path, body = Calls.of(http.get("/config").json()).load_jobs()
        return listed(http.post(path, json=body))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_jobs_go_on_without_the_dashboard_and_a_new_one_shows_them(home, app, how):
    hold = home.root / "hold"
    hold.touch()
    dashboard, url = app()
    jobs = [create(home, name) for name in ("first", "second")]  # the dashboard's own watch starts the scheduler
    engines = until(lambda: at_work(home, jobs))
    before = runners(home, jobs)
    page = shown(url)
    assert "first" in page and "second" in page

    with open_page(url):
        os.kill(dashboard.pid, how)
        dashboard.wait(60)  # an open page holds a connection, which must not hold up the end
    assert runners(home, jobs) == before and at_work(home, jobs) == engines
    for pid in (*engines.values(), *(facts["pid"] for facts in before.values())):
        os.kill(pid, 0)  # all of them live

    _, url = app()
    page = shown(url)
    assert page.count('data-job="first"') == 1 and page.count('data-job="second"') == 1
    assert "unning" in page
    assert runners(home, jobs) == before

    hold.unlink()
    store = JobStore(home)
    ended = until(lambda: (found := [store.get(j.uid) for j in jobs]) and not any(j.is_active for j in found) and found)
    assert [(job.state, job.attempt) for job in ended] == [("succeeded", 1)] * 2
    assert len(engine.starts(home.root)) == 2  # nothing was started a second time
    until(lambda: "Succeeded" in (text := shown(url)) or "succeeded" in text)
    assert control.log_path(home, jobs[0].uid).read_text().count("attempt 1") >= 1


def test_a_dashboard_that_is_started_later_takes_care_of_what_it_finds(home, app):
    """The scheduler and a runner died with the dashboard, as in a machine's reboot without the boot."""
    hold = home.root / "hold"
    hold.touch()
    dashboard, _ = app()
    jobs = [create(home, "first")]
    until(lambda: at_work(home, jobs))
    dashboard.kill()
    dashboard.wait()
    end(home)
    assert JobStore(home).get(jobs[0].uid).state == "running"
    hold.unlink()
    app()
    job = until(lambda: (found := JobStore(home).get(jobs[0].uid)) and not found.is_active and found)
    assert (job.state, job.attempt) == ("succeeded", 2)
