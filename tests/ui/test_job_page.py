"""A job's page: what it sends while the job goes on, and while the store cannot be read."""

from __future__ import annotations

import html
import json
import os
import re
import sqlite3
from types import SimpleNamespace

import gradio as gr
import pytest

from backend.jobs import control
from backend.jobs.store import JobStore
from backend.jobs.usage import USAGE_FILE, Sample, UsageFile
from backend.schema import parse_yaml
from ui.draft import TEMPLATE
from ui.pages import job as job_page
from ui.pages.job import IDLE_REFRESH_S, REFRESH_S

pytestmark = pytest.mark.usefixtures("no_scheduler")

NOBODY = SimpleNamespace(username=None)  # the request of a page that needs no login

PARTS = (
    "seen",
    "timer",
    "said",
    "head",
    "facts",
    "result",
    "ran",
    "stages",
    "notes",
    "made",
    "history",
    "tradeoff",
    "sizes",
    "tuning",
    "layers",
    "usage",
    "words",
    "live",
)


@pytest.fixture
def job(home):
    return JobStore(home).create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")


@pytest.fixture
def page(home):
    """The page's handlers by name; `show` answers with its parts by name."""
    with gr.Blocks() as demo:
        job_page.build(demo, home)
    found = {fn.fn.__name__: fn.fn for fn in demo.fns.values()}

    def show(seen):
        return dict(zip(PARTS, found["show"](seen), strict=True))

    return SimpleNamespace(show=show, on_load=found["on_load"], on_action=found["on_action"])


def sent(part):
    """Whether the browser gets something for a part; `gr.skip()` is an update without anything in it."""
    return not (isinstance(part, dict) and "value" not in part)


def figure(shown, chart):
    """What a chart is drawn from: its first value, or what is carried into the chart that is there."""
    if isinstance(shown[chart], gr.Plot):
        return json.loads(shown[chart].value["plot"])
    found = (
        re.search(f'data-chart="{chart}" data-figure="([^"]*)"', shown["live"].value) if sent(shown["live"]) else None
    )
    return json.loads(html.unescape(found[1])) if found else None


def memory_drawn(shown):
    """The values of the line of memory."""
    return figure(shown, "usage")["data"][0]["y"]


def start(home, job):
    store = JobStore(home)
    assert store.grant(job.uid, job.attempt, ["cpu:0"])
    assert store.move(job.uid, "running", actor="runner", attempt=job.attempt)
    return store


def test_the_page_follows_a_job_from_its_wait_to_its_end(home, job, page):
    store = JobStore(home)
    store.wait(job.uid, 1, "waiting: job b uses GPU 0")
    first = page.show({"uid": job.uid})
    assert "Waiting" in first["head"].value and "waiting: job b uses GPU 0" in first["facts"].value
    start(home, job)
    store.update(job.uid, 1, progress={"stage": "quantize", "step": 2, "total": 4, "message": "model.layers.1"})
    second = page.show(first["seen"])
    assert "Running" in second["head"].value and "2 of 4 · model.layers.1" in second["stages"].value
    store.set_stalled(job.uid, 1, True)
    third = page.show(second["seen"])
    assert "No sign of life for a while" in third["facts"].value and not sent(third["stages"])
    store.move(job.uid, "cancelling", actor="user", attempt=1, reason="cancel requested")
    store.update(job.uid, 1, progress={"stage": "quantize", "message": "cancelling: asked to stop (SIGINT)"})
    fourth = page.show(third["seen"])
    assert "Asked to stop (SIGINT)" in fourth["facts"].value and "Cancel<" not in fourth["head"].value
    store.move(job.uid, "cancelled", actor="runner", attempt=1, reason="cancelled", outcome="cancelled")
    last = page.show(fourth["seen"])
    assert "Resume" in last["head"].value
    states = [row["to_state"] for row in store.history(job.uid)]
    assert states == ["queued", "starting", "running", "cancelling", "cancelled"]
    assert last["history"].value.count("<tr>") == 1 + len(states)


def test_a_lost_job_shows_its_attempts(home, job, page):
    store = start(home, job)
    assert store.move(job.uid, "lost", actor="scheduler", attempt=1, reason="the runner is gone", outcome="runner_died")
    lost = page.show({"uid": job.uid})
    assert "This job has lost its process" in lost["facts"].value and "the runner is gone" in lost["facts"].value
    assert store.requeue(job.uid, 1, actor="scheduler", reason="its process was gone")
    again = page.show(lost["seen"])
    assert "2 of 3" in again["facts"].value and "its process was gone" in again["history"].value


def test_what_does_not_change_is_not_sent_again(home, job, page):
    seen = page.show({"uid": job.uid})["seen"]
    again = page.show(seen)
    assert [name for name in PARTS[1:] if sent(again[name])] == []
    assert len(str(seen)) < 2_000  # all that a session keeps, however long log and history are


def test_a_job_that_is_over_is_looked_at_less_often_and_still_noticed_when_it_goes_on(home, job, page):
    first = page.show({"uid": job.uid})
    assert first["timer"].value == REFRESH_S
    control.cancel(home, job.uid)
    over = page.show(first["seen"])
    assert over["timer"].value == IDLE_REFRESH_S and over["timer"].active
    control.resume(home, job.uid)  # from elsewhere
    again = page.show(over["seen"])
    assert again["timer"].value == REFRESH_S and "Waiting" in again["head"].value


def test_layer_errors_are_read_when_they_have_changed(home, job, page):
    file = home.run_dir(job.uid) / "events.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    line = {"stage": "quantize", "layer": "model.layers.0", "error": 0.01, "rtn_error": 0.02}
    file.write_text(json.dumps(line) + "\n")
    first = page.show({"uid": job.uid})
    assert sent(first["layers"])
    assert not sent(page.show(first["seen"])["layers"])
    with open(file, "a") as more:
        more.write(json.dumps({**line, "layer": "model.layers.1"}) + "\n")
    second = page.show(first["seen"])
    assert not sent(second["layers"]) and list(figure(second, "layers")["data"][0]["x"]) == [0, 1]  # into what is there


def test_layers_have_their_place_before_the_first_is_done(home, job, page):
    assert not sent(page.show({"uid": job.uid})["layers"])
    store = start(home, job)
    first = page.show({"uid": job.uid})
    assert first["layers"].visible and "from the first one on" in first["layers"].value["plot"]
    assert not sent(page.show(first["seen"])["layers"])
    store.move(job.uid, "failed", actor="runner", attempt=1, reason="no such model")
    over = page.show(first["seen"])
    assert over["layers"].visible is False and "layers" not in over["seen"]["drawn"]


def test_a_tuning_curve_appears_with_its_first_step(home, job, page):
    file = home.run_dir(job.uid) / "events.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"stage": "tune", "step": 0, "message": "loading"}) + "\n")
    first = page.show({"uid": job.uid})
    assert not sent(first["tuning"])
    with open(file, "a") as more:
        more.write(json.dumps({"stage": "tune", "step": 1, "loss": 0.02, "validation": None}) + "\n")
    assert sent(page.show(first["seen"])["tuning"])


def test_what_a_job_takes_is_drawn_while_it_runs_and_afterwards(home, job, page):
    path = home.run_dir(job.uid) / USAGE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    assert not sent(page.show({"uid": job.uid})["usage"])
    store, file = start(home, job), UsageFile(path)
    for i in range(1, 4):
        file.add(Sample(1, float(i), 1.0, "quantize", "", i * 10**9, 1.5))
    os.utime(path, (1000, 1000))
    first = page.show({"uid": job.uid})
    assert memory_drawn(first) == [1.0, 2.0, 3.0]
    assert "Now 3.00 GB, 1.5 cores. At most 3.00 GB of memory" in first["words"].value
    assert figure(page.show(first["seen"]), "usage") is None
    file.add(Sample(1, 4.0, 1.0, "quantize", "", 10**9, 1.5))
    os.utime(path, (1000.5, 1000.5))
    assert figure(page.show(first["seen"]), "usage") is None  # too soon to be seen
    os.utime(path, (1001.5, 1001.5))
    second = page.show(first["seen"])
    assert len(memory_drawn(second)) == 4 and "Now 1.00 GB" in second["words"].value
    store.move(job.uid, "succeeded", actor="runner", attempt=1)
    last = page.show(second["seen"])
    assert (
        len(memory_drawn(last)) == 4
        and last["words"].value.count("Now") == 0
        and "At most 3.00 GB" in last["words"].value
    )


@pytest.mark.parametrize("uid", ["", "no-such", "../../etc/passwd", "' OR 1=1 --", "\ud800", "x" * 100_000])
def test_an_address_without_a_job_says_so(home, page, uid):
    JobStore(home)
    shown = page.on_load(SimpleNamespace(query_params={"id": uid}))
    assert "No such job" in shown[PARTS.index("head")] and shown[1].active is False


def test_a_busy_store_is_not_taken_for_a_missing_job(home, job, page):
    first = page.show({"uid": job.uid})
    writer = sqlite3.connect(home.jobs_db, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    busy = page.show(first["seen"])
    assert "The job store is busy" in busy["said"].value and not sent(busy["head"])
    assert busy["timer"].active  # it goes on asking
    writer.execute("ROLLBACK")
    writer.close()
    after = page.show(busy["seen"])
    assert after["said"].visible is False and not sent(after["head"])


def test_a_damaged_store_is_told(home, job, page):
    first = page.show({"uid": job.uid})
    home.jobs_db.write_bytes(b"garbage" * 1000)
    assert "The job store cannot be read" in page.show(first["seen"])["said"].value
    fresh = page.on_load(SimpleNamespace(query_params={"id": job.uid}))
    assert "The job store cannot be read" in fresh[PARTS.index("said")].value


def test_buttons_of_the_page_act_on_its_own_job_only(home, job, page):
    other = TEMPLATE.replace("my-first-job", "another")
    other = JobStore(home).create(other, parse_yaml(other).config, device="cpu")
    seen = page.show({"uid": job.uid})["seen"]
    said, after = page.on_action(seen, gr.EventData(None, {"act": "cancel", "uid": other.uid}), NOBODY)
    assert "Nothing was changed" in said.value and JobStore(home).get(other.uid).state == "queued"
    said, after = page.on_action(after, gr.EventData(None, {"act": "resume", "uid": job.uid}), NOBODY)
    assert "Nothing was changed" in said.value
    assert sent(page.show(after)["head"])  # the button can be used again
    said, after = page.on_action(after, gr.EventData(None, {"act": "cancel", "uid": job.uid}), NOBODY)
    assert said.visible is False and "Cancelled" in page.show(after)["head"].value
    for data in (None, [], {"act": 1, "uid": job.uid}, {"act": "drop table", "uid": job.uid}):
        assert "Nothing was changed" in page.on_action(after, gr.EventData(None, data), NOBODY)[0].value


def test_the_log_is_asked_for_by_the_browser_and_kept_by_nobody(home, job):
    with gr.Blocks() as demo:
        job_page.build(demo, home)
    log = next(block for block in demo.blocks.values() if block.elem_id == "log")
    assert {fn.__name__ for fn in log.server_fns} >= {"read_log", "find_in_log"}
    control.log_path(home, job.uid).parent.mkdir(parents=True)
    control.log_path(home, job.uid).write_text("hello\n")
    assert log.read_log({"uid": job.uid})["lines"] == ["hello"]
    assert log.find_in_log({"uid": job.uid, "text": "HELLO"})["lines"] == ["hello"]
