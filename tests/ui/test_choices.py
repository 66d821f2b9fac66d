"""What compare and chat offer to choose from when there are very many jobs, and while the store cannot be read."""

from __future__ import annotations

import sqlite3
from types import SimpleNamespace

import gradio as gr
import pytest

from backend.jobs.store import JobStore
from backend.paths import Home
from tests.ui.many import fill
from ui.chat_pair import ChatPair
from ui.pages import chat, compare
from ui.pages.chat import finished, models_to_choose
from ui.pages.compare import LISTED, MAX_ASKED, asked_for, measurements


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("many") / "home")
    fill(home, 1_000, states=("succeeded",))
    return home


def uid(number):
    return f"{number:012x}{number:010x}"


def handlers(build):
    with gr.Blocks() as demo:
        build(demo)
    return {fn.fn.__name__: fn.fn for fn in demo.fns.values()}


def test_the_newest_are_listed_and_any_other_can_be_asked_for(many):
    found = measurements(many, also=[uid(3), "no-such", "", "\ud800"])
    assert len(found) == LISTED + 1
    assert [one.label for one in found[:2]] == ["job-00999", "job-00998"] and found[-1].label == "job-00003"
    assert [one.label for one in asked_for(many, [uid(5), uid(3), "no-such"])] == ["job-00005", "job-00003"]
    assert len(asked_for(many, [uid(i) for i in range(1_000)])) == MAX_ASKED


def test_chat_lists_the_newest_and_the_one_that_is_asked_for(many):
    choices = models_to_choose(finished(many, uid(7)))
    assert len(choices) == chat.LISTED + 1 and choices[-1] == (choices[-1][0], uid(7))
    assert len(finished(many)) == len(finished(many, "no-such")) == chat.LISTED


def test_an_old_job_is_compared_by_its_address(many):
    on_load = handlers(lambda demo: compare.build(demo, many))["on_load"]
    request = SimpleNamespace(query_params={"jobs": f"{uid(7)},{uid(998)}"})
    assert on_load(request)[1].value == [uid(998), uid(7)]


def test_drawing_reads_only_what_was_chosen(many, monkeypatch):
    on_jobs = handlers(lambda demo: compare.build(demo, many))["on_jobs"]
    monkeypatch.setattr(JobStore, "jobs", lambda *a, **k: pytest.fail("all jobs were read"))
    *_, table = on_jobs([uid(7), uid(3), f"{uid(3)}/w2", 5, "\ud800"])
    assert table.index("job-00003") < table.index("job-00007") and "job-00999" not in table
    assert on_jobs(None)[-1] == ""


def test_a_busy_store_is_told(many):
    pages = (
        handlers(lambda demo: compare.build(demo, many)),
        handlers(lambda demo: chat.build(demo, many, ChatPair(many))),
    )
    writer = sqlite3.connect(many.jobs_db, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    try:
        for page in pages:
            answer = page["on_load"](SimpleNamespace(query_params={}))
            assert "The job store is busy" in answer[0].value and answer[0].visible
        assert "The job store is busy" in pages[0]["on_jobs"]([uid(7)])[-1]
    finally:
        writer.execute("ROLLBACK")
        writer.close()
