"""The list of jobs: pages, search, states, clicks, and what it says while the store cannot be read."""

from __future__ import annotations

import re
import sqlite3
import time
from types import SimpleNamespace

import gradio as gr
import pytest
from starlette.datastructures import URL, QueryParams

from backend.errors import JobError
from backend.jobs import launch
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.process import hold_lock
from backend.schema import parse_yaml
from tests.ui.many import fill
from ui.draft import TEMPLATE
from ui.jobactions import act_on
from ui.jobslist import View, moved, read_list
from ui.jobstable import filters_html, table_html, title_html
from ui.pages import jobs as jobs_page
from ui.pages.jobs import PATIENCE
from ui.reading import Results

pytestmark = pytest.mark.usefixtures("no_scheduler")
NOBODY = SimpleNamespace(username=None)  # the request of a page that needs no login

DRAWN = ("heading", "health", "filters", "table", "seen")


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("many") / "home")
    fill(home, 10_000)
    return home


def submit(home, name="a-job"):
    text = TEMPLATE.replace("my-first-job", name)
    return JobStore(home).create(text, parse_yaml(text).config, device="cpu")


def names(listing):
    return [job.job_id for job in listing.jobs]


def handler(home, name):
    """The function behind one of the page's events."""
    with gr.Blocks() as demo:
        jobs_page.build(demo, home)
    return next(fn.fn for fn in demo.fns.values() if fn.fn.__name__ == name)


def drawn(values):
    return dict(zip(DRAWN, values, strict=True))


# -- pages, search, states


def test_ten_thousand_jobs_are_paged_newest_first(many):
    first, second = (read_list(many, View(page=page), Results()) for page in (1, 2))
    assert names(first) == [f"job-{i:05d}" for i in range(9_999, 9_949, -1)]
    assert names(second)[0] == "job-09949"
    last = read_list(many, View(page=200), Results())
    assert names(last)[-1] == "job-00000" and last.pages == 200
    assert "9,951 to 10,000 of 10,000 jobs, page 200 of 200" in table_html(last)
    assert "51 to 100 of 10,000 jobs" in table_html(second)


def test_a_page_that_does_not_exist_becomes_the_last_one(many):
    assert read_list(many, View(page=9_999_999), Results()).view.page == 200


def test_every_job_is_on_one_page_only(many):
    seen = [name for page in range(1, 41) for name in names(read_list(many, View("failed", page=page), Results()))]
    assert len(seen) == len(set(seen)) == 2_000


def test_states_are_counted_within_the_search(many):
    everything = read_list(many, View(), Results())
    assert everything.groups == {
        "": 10_000, "running": 0, "waiting": 0, "succeeded": 6_000, "failed": 2_000, "cancelled": 2_000,
        "deleted": 0,
    }  # fmt: skip
    found = read_list(many, View("failed", "model-3"), Results())  # model-3 and model-30 to model-39
    assert found.groups == {
        "": 2_200, "running": 0, "waiting": 0, "succeeded": 1_200, "failed": 600, "cancelled": 400, "deleted": 0,
    }  # fmt: skip
    assert {job.state for job in found.jobs} == {"failed"} and all("model-3" in job.model for job in found.jobs)
    html = filters_html(found)
    assert re.search(r'data-uid="failed" aria-pressed="true"[^>]*>Failed <b>600</b>', html)
    assert re.search(r'data-uid="" aria-pressed="false"[^>]*>All <b>2,200</b>', html)


@pytest.mark.parametrize(
    ("search", "found"),
    [("job-00042", 1), ("JOB-00042", 1), ("  job-00042 ", 1), ("%", 0), ("job_00042", 0), ("nothing", 0), ("'; --", 0)],
)
def test_search_takes_the_words_as_they_are(many, search, found):
    assert read_list(many, View(search=search), Results()).total == found


def test_any_text_can_be_searched(many):
    refresh = handler(many, "refresh")
    for text in ("\ud800", "\x00", "a" * 100_000, "' OR 1=1 --", "\\", None):
        assert isinstance(drawn(refresh(View(), text, {}))["table"], str)


def test_nothing_found_is_told_with_the_way_back(many):
    html = table_html(read_list(many, View(search="nothing"), Results()))
    assert "No job matches" in html and 'data-act="clear"' in html


def test_a_list_reads_neither_files_nor_results(many):
    known = Results()
    cold = read_list(many, View(), known)
    assert all(job.config_yaml == "" and job.result is None for job in cold.jobs)
    assert "perplexity" in table_html(cold) and "33.3 % of the size" in table_html(cold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JobStore, "jobs", lambda *a, **k: pytest.fail("results were read again"))
        warm = read_list(many, View(), known)
    assert table_html(warm) == table_html(cold)
    assert re.search(r'href="/compare\?jobs=[0-9a-f]{22}(,[0-9a-f]{22}){5}"', title_html(warm))


def test_what_is_known_of_results_is_bounded(many):
    known = Results(limit=40)
    for page in range(1, 5):
        read_list(many, View("succeeded", page=page), known)
    assert len(known._kept) == 40


def test_a_large_list_is_answered_soon(many):
    refresh = handler(many, "refresh")
    times = []
    for page in range(1, 21):
        begin = time.perf_counter()
        refresh(View(page=page), "model-3", {})
        times.append(time.perf_counter() - begin)
    assert sorted(times)[10] < 5.0  # measured: 0.06 s; a list that reads everything takes longer than this


# -- addresses


@pytest.mark.parametrize(
    ("query", "view"),
    [
        ({}, View()),
        ({"state": "failed", "q": "a b&c", "p": "3"}, View("failed", "a b&c", 3)),
        ({"state": "<script>", "p": "-1"}, View()),
        ({"p": "99999999999999999999"}, View()),
        ({"p": "²"}, View()),
        ({"p": "0"}, View()),
        ({"q": "x" * 5000}, View(search="x" * 100)),
    ],
)
def test_an_address_shows_what_it_says_and_nonsense_is_left_out(query, view):
    assert View.of(query) == view


@pytest.mark.parametrize("view", [View(), View("failed"), View("", "a&b=c d/é", 7), View("waiting", "#?%", 2)])
def test_an_address_brings_the_same_view_back(view):
    assert View.of(QueryParams(URL(view.address).query)) == view


def test_the_table_tells_the_address_to_the_browser(many):
    html = table_html(read_list(many, View("failed", "model-3", 2), Results()))
    assert 'data-address="/?state=failed&amp;q=model-3&amp;p=2"' in html


# -- clicks


def test_clicks_on_filters_and_pages_move_and_nonsense_leads_home():
    assert moved(View("failed", "x", 3), "filter", "running") == View("running", "x", 1)
    assert moved(View("failed", "x", 3), "page", "4") == View("failed", "x", 4)
    assert moved(View("failed", "x", 3), "clear", "") == View()
    for what in ("-1", "x", "", "1e9"):
        assert moved(View(page=3), "page", what).page == 1
    assert moved(View("failed"), "filter", "<script>").group == ""


def test_another_search_begins_at_its_first_page(many):
    refresh, on_action = handler(many, "refresh"), handler(many, "on_action")
    shown = drawn(refresh(View("failed", page=3), "model-3", {}))["table"]
    assert "1 to 50 of 600 jobs" in shown
    view, _, _ = on_action(View("failed"), "model-3", gr.EventData(None, {"act": "page", "uid": "2"}), NOBODY)
    assert view == View("failed", "model-3", 2, turn=1)
    assert "51 to 100 of 600 jobs" in drawn(refresh(view, "model-3", {}))["table"]
    assert "1 to 50 of 2,000 jobs" in drawn(refresh(view, "", {}))["table"]


def test_buttons_do_what_the_state_allows_and_say_no_else(home):
    job = submit(home)
    with pytest.raises(JobError, match="queued"):
        act_on(home, "resume", job.uid)
    with pytest.raises(JobError, match="queued"):
        act_on(home, "measure", job.uid)
    assert "was cancelled" in act_on(home, "cancel", job.uid)
    with pytest.raises(JobError, match="already cancelled"):
        act_on(home, "cancel", job.uid)
    assert "attempt 2" in act_on(home, "resume", job.uid)
    assert JobStore(home).get(job.uid).state == "queued"
    act_on(home, "cancel", job.uid)
    assert "measured again (attempt 3)" in act_on(home, "measure", job.uid)
    assert JobStore(home).get(job.uid).redo == "measure"
    for act, uid in (("delete", job.uid), ("", job.uid), ("cancel", ""), ("cancel", "no-such"), ("cancel", "' OR 1")):
        with pytest.raises(JobError):
            act_on(home, act, uid)
    assert JobStore(home).get(job.uid).state == "queued"


@pytest.mark.parametrize(
    "data", [None, {}, [], "x", {"act": "cancel"}, {"act": ["cancel"], "uid": {}}, {"act": "cancel", "uid": "x" * 9999}]
)
def test_a_crafted_click_changes_nothing_and_is_answered(home, data):
    job = submit(home)
    on_action = handler(home, "on_action")
    _, _, said = on_action(View(), "", gr.EventData(None, data), NOBODY)
    assert "Nothing was changed" in said.value
    assert JobStore(home).get(job.uid).state == "queued"


def test_a_click_is_answered_and_draws_its_button_anew(home):
    job = submit(home)
    on_action, refresh = handler(home, "on_action"), handler(home, "refresh")
    before = drawn(refresh(View(), "", {}))
    view, _, said = on_action(View(), "", gr.EventData(None, {"act": "cancel", "uid": job.uid}), NOBODY)
    assert "was cancelled" in said.value
    assert "Cancelled" in drawn(refresh(view, "", before["seen"]))["table"]
    # A click that is refused leaves the job as it was, and yet the table is sent again.
    seen = drawn(refresh(view, "", {}))["seen"]
    view, _, said = on_action(view, "", gr.EventData(None, {"act": "cancel", "uid": job.uid}), NOBODY)
    assert "Nothing was changed" in said.value
    assert isinstance(drawn(refresh(view, "", seen))["table"], str)


def test_nothing_is_sent_while_nothing_changes(home):
    submit(home)
    refresh = handler(home, "refresh")
    seen = {}
    for _ in range(PATIENCE + 1):
        seen = drawn(refresh(View(), "", seen))["seen"]
    again = drawn(refresh(View(), "", seen))
    assert all(isinstance(again[name], dict) and "value" not in again[name] for name in DRAWN[:-1])  # gr.skip()
    assert len(str(again["seen"])) < 200  # all that a session keeps


# -- health


def test_a_missing_scheduler_is_told_after_a_moment_and_no_longer_than_it_lasts(home):
    submit(home)
    refresh = handler(home, "refresh")
    seen, told = {}, []
    for _ in range(PATIENCE + 1):
        now = drawn(refresh(View(), "", seen))
        seen = now["seen"]
        if isinstance(now["health"], gr.HTML):
            told.append(now["health"].value)
    assert told[0] == "" and "the scheduler is not running" in told[-1]
    with hold_lock(launch.scheduler_lock(home)) as held:
        assert held
        now = drawn(refresh(View(), "", seen))
    assert now["health"].visible is False


def test_no_scheduler_is_needed_while_no_job_waits(many):
    refresh = handler(many, "refresh")
    seen = {}
    for _ in range(PATIENCE + 1):
        now = drawn(refresh(View(), "", seen))
        seen = now["seen"]
    assert seen["lonely"] == 0


def test_a_busy_store_is_told_and_the_page_goes_on(home):
    job = submit(home)
    refresh, on_action = handler(home, "refresh"), handler(home, "on_action")
    before = drawn(refresh(View(), "", {}))
    writer = sqlite3.connect(home.jobs_db, isolation_level=None)
    writer.execute("BEGIN EXCLUSIVE")
    begin = time.monotonic()
    busy = drawn(refresh(View(), "", before["seen"]))
    _, _, said = on_action(View(), "", gr.EventData(None, {"act": "cancel", "uid": job.uid}), NOBODY)
    assert time.monotonic() - begin < 30  # the store's own patience is 60 s
    assert "The job store is busy" in busy["health"].value and busy["health"].visible
    assert "Nothing was changed" in said.value
    assert not isinstance(busy["table"], str)  # what is shown stays
    writer.execute("ROLLBACK")
    writer.close()
    after = drawn(refresh(View(), "", busy["seen"]))
    assert after["health"].visible is False and "a-job" in after["table"]


def test_a_damaged_store_is_told_and_left_as_it_is(home):
    submit(home)
    refresh = handler(home, "refresh")
    seen = drawn(refresh(View(), "", {}))["seen"]
    good = home.jobs_db.read_bytes()
    home.jobs_db.write_bytes(b"this is no database" * 500)
    bad = drawn(refresh(View(), "", seen))
    assert "The job store cannot be read" in bad["health"].value
    assert home.jobs_db.read_bytes() == b"this is no database" * 500
    home.jobs_db.unlink()
    gone = drawn(refresh(View(), "", bad["seen"]))
    assert "The job store cannot be read" in gone["health"].value
    assert not home.jobs_db.exists()
    home.jobs_db.write_bytes(good)
    assert "a-job" in drawn(refresh(View(), "", gone["seen"]))["table"]
