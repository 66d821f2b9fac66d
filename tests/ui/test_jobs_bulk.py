"""The list of jobs as a tool for many: sorting, tags and notes, what is done with a selection, deleting and undoing."""

from __future__ import annotations

import re
from types import SimpleNamespace

import gradio as gr
import pytest
from starlette.datastructures import URL, QueryParams

from backend.errors import JobError
from backend.jobs import deletion, labels
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.jobs.stored import make, start
from tests.ui.many import fill
from ui import labelsview
from ui.jobactions import MAX_REASONS, act_on, act_on_many, chosen
from ui.jobslist import PER_PAGE, View, moved, next_sort, read_list
from ui.jobstable import filters_html, table_html, title_html
from ui.pages import job as job_page
from ui.pages import jobs as jobs_page
from ui.reading import Results

pytestmark = pytest.mark.usefixtures("no_scheduler")
NOBODY = SimpleNamespace(username=None)
EVIL = '<img src=x onerror="alert(1)">"\'>'


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("many") / "home")
    fill(home, 10_000)
    for number in range(0, 10_000, 100):
        labels.change(home, f"{number:012x}{number:010x}", tags=["sweep", f"n{number % 300}"])
    return home


@pytest.fixture
def few(home):
    """One job of each kind: waiting, at work, over."""
    store = JobStore(home)
    make(store, "waits")
    assert start(store, make(store, "works"), "cpu:0")
    for name in ("one", "two"):
        store.move(make(store, name).uid, "cancelled", actor="user", attempt=1)
    return home


def handlers(home, page=jobs_page):
    with gr.Blocks() as demo:
        page.build(demo, home)
    return {fn.fn.__name__: fn.fn for fn in demo.fns.values()}


def listed(home, **view):
    return read_list(home, View(**view), Results())


def names(listing):
    return [job.job_id for job in listing.jobs]


def uids(home, *wanted):
    return [JobStore(home).get(name).uid for name in wanted]


def click(home, act, *which, uid="", view=None):
    """The page's handler with a click on a button for several jobs."""
    event = gr.EventData(None, {"act": act, "uid": uid, "uids": " ".join(which)})
    return handlers(home)["on_action"](view or View(), "", event, NOBODY)


# -- the order


def test_a_click_on_a_column_sorts_by_it_then_the_other_way_then_not():
    assert [next_sort(sort, "name") for sort in ("", "name", "-name", "time")] == ["name", "-name", "", "name"]
    assert [next_sort(sort, "time") for sort in ("", "-time", "time")] == ["-time", "time", ""]
    for nonsense in ("", "-name", "uid; --", EVIL, "x" * 9999):
        assert next_sort("name", nonsense) == ""
    assert moved(View("failed", "x", 4), "sort", "state") == View("failed", "x", 1, sort="state")


def test_an_address_keeps_the_order_and_a_wrong_one_is_left_out():
    view = View("failed", "tag:a b", 3, sort="-time")
    assert View.of(QueryParams(URL(view.address).query)) == view
    assert View.of({"sort": "uid"}).sort == View.of({"sort": EVIL}).sort == ""
    assert View.of({"sort": "-started"}).sort == "-started"


def test_ten_thousand_jobs_are_sorted_and_each_is_on_one_page_only(many):
    first = listed(many, sort="name")
    assert names(first) == [f"job-{i:05d}" for i in range(50)]
    assert names(listed(many, sort="-name", page=200))[-1] == "job-00000"
    seen = [job.job_id for job in JobStore(many).summaries(sort="state", limit=20_000)]
    assert len(seen) == len(set(seen)) == 10_000
    assert seen[:2] == ["job-09997", "job-09996"] and seen[-1] == "job-00004"  # succeeded ... cancelled, newest first
    for page in (1, 2, 121, 200):
        assert names(listed(many, sort="state", page=page)) == seen[50 * page - 50 : 50 * page]
    html = table_html(first)
    assert '<th aria-sort="ascending"><button type="button" class="qd-sort" data-act="sort" data-uid="name"' in html
    assert html.count('aria-sort="none"') == 4 and "Next" in html and "Older" not in html
    assert 'aria-sort="descending"' in table_html(listed(many, sort="-time"))


# -- tags and notes


def test_tags_narrow_ten_thousand_jobs_and_counts_follow(many):
    found = listed(many, search="tag:sweep")
    assert found.total == 100 and found.groups["succeeded"] == 100 and found.groups["failed"] == 0
    assert listed(many, search="tag:sweep tag:n0").total == 34 and listed(many, search="tag:swee").total == 0
    assert '<button type="button" class="qd-tag" data-act="tag" data-uid="sweep"' in table_html(found)


def test_a_click_on_a_tag_searches_for_it_and_nonsense_for_nothing(few):
    labels.change(few, "one", tags="sweep")
    view, search, _ = click(few, "tag", uid="sweep", view=View(search="other", page=3))
    assert (view.search, search, view.page) == ("tag:sweep", "tag:sweep", 1)
    assert names(read_list(few, view, Results())) == ["one"]
    assert moved(View(search="x"), "tag", EVIL).search == ""


def test_a_note_is_text_wherever_it_is_shown(few):
    labels.change(few, "one", note=f"{EVIL} ${{1+1}} " + "long " * 100)
    html = table_html(listed(few))
    assert "<img" not in html and "&lt;img src=x" in html and "...</span>" in html


def test_labels_are_read_and_changed_on_the_jobs_page(few):
    (uid,) = uids(few, "one")
    labels.change(few, uid, tags="b a", note="n\nm")
    page = handlers(few, job_page)
    at = SimpleNamespace(query_params={"id": uid})
    box, tags, note = page["on_labels"](at)
    assert (box.label, tags, note) == ("Tags and note: a, b and a note", "a b", "n\nm")
    box, tags, _, said = page["on_save"]({"uid": uid}, "C, a", "")
    assert (box.label, tags, "Saved" in said.value) == ("Tags and note: a, c", "a c", True)
    assert (JobStore(few).get(uid).tags, JobStore(few).get(uid).note) == (("a", "c"), "")
    for words, text in ((EVIL, ""), ("a", "x" * 3000), ("a", "\x00"), ("a " * 5000 + "b/c", None)):
        *_, said = page["on_save"]({"uid": uid}, words, text)
        assert "were not changed" in said.value and "<img" not in said.value
    for nobody in ({}, {"uid": "nobody"}, {"uid": None}):
        assert "were not changed" in page["on_save"](nobody, "a", "")[-1].value
    assert JobStore(few).get(uid).tags == ("a", "c")
    assert page["on_labels"](SimpleNamespace(query_params={"id": "nobody"})) == [gr.skip()] * 3
    assert labelsview.shown(JobStore(few).get("two"))[0].label == "Tags and note"


# -- a selection


def test_what_comes_with_a_click_is_ids_or_nothing():
    good = [f"{i:022x}" for i in range(PER_PAGE + 5)]
    event = lambda uids: gr.EventData(None, {"act": "delete", "uid": "", "uids": uids})  # noqa: E731
    assert chosen(event(" ".join(good[:2])), "") == good[:2] and chosen(event(" ".join([good[0]] * 3)), "") == good[:1]
    assert chosen(event(""), good[3]) == [good[3]]
    assert len(chosen(event(" ".join(good)), "")) == PER_PAGE
    for junk in (None, 7, ["x"], {}, EVIL, "../../x", "a" * 22 + "\x00", "x " * 10_000, "\ud800"):
        assert chosen(event(junk), "") == []
    assert chosen(gr.EventData(None, "x"), "") == []


def test_each_row_says_what_can_be_done_with_it(few, many):
    can = dict(re.findall(r'data-job="(\w+)".*?data-can="([a-z ]*)"', table_html(listed(few))))
    assert can == {"waits": "cancel", "works": "cancel", "one": "delete", "two": "delete"}
    html = table_html(listed(many))
    assert html.count("data-pick") == 50 and 'data-can="delete compare"' in html and "data-all" in html
    assert 'aria-label="Select job-09999"' in html


def test_many_are_deleted_at_once_and_those_that_cannot_be_are_told_with_the_reason(few):
    which = uids(few, "waits", "one", "works", "two")
    _, _, said = click(few, "delete", *which, "0" * 22)
    assert "2 jobs were deleted" in said.value and "3 were not:" in said.value
    assert "Job waits is queued; cancel it first" in said.value and "Job works is running" in said.value
    assert "There is no job" in said.value and "qd-warn" in said.value
    assert f'data-uids="{which[1]} {which[3]}"' in said.value  # what Undo restores
    after = listed(few)
    assert names(after) == ["works", "waits"] and after.groups[""] == 2 and after.groups["deleted"] == 2
    assert sum(after.counts.values()) == 2
    _, _, said = click(few, "restore", which[1], which[3])
    assert "2 jobs were restored" in said.value and "qd-good" in said.value and "Undo" not in said.value
    assert listed(few).groups[""] == 4
    assert JobStore(few).history(which[1])[-2]["reason"] == "deleted"


def test_many_are_cancelled_at_once(few):
    _, _, said = click(few, "cancel", *uids(few, "waits", "works", "one"))
    assert "Job waits was cancelled and job works is being stopped" in said.value and "1 was not:" in said.value
    assert "already cancelled" in said.value
    store = JobStore(few)
    assert [store.get(name).state for name in ("waits", "works", "one")] == ["cancelled", "cancelling", "cancelled"]


def test_nothing_done_is_said_so_and_no_more_reasons_than_one_reads(home):
    store = JobStore(home)
    active = [make(store, f"job-{i}").uid for i in range(MAX_REASONS + 3)]
    told = act_on_many(home, "delete", active)
    assert "Nothing was changed" in told and "and 3 more reasons" in told and "Undo" not in told
    for act in ("cancel", "delete", "restore", "ask-erase", "erase"):
        with pytest.raises(JobError, match="did not say which jobs"):
            act_on_many(home, act, [])
    assert store.count(("queued",)) == MAX_REASONS + 3


def test_a_busy_store_is_waited_for_once_and_not_for_each(few, monkeypatch):
    from backend.jobs.store import StoreBusyError

    calls = []

    def busy(home, uid, *, actor):
        calls.append(uid)
        raise StoreBusyError("the job store is busy")

    monkeypatch.setattr(deletion, "delete", busy)
    assert "The job store is busy." in act_on_many(few, "delete", uids(few, "one", "two", "waits"))
    assert len(calls) == 1


# -- deleted jobs


def test_deleted_jobs_have_their_own_list_which_is_offered_when_there_are_some(few):
    assert ">Deleted <b>" not in filters_html(listed(few))
    assert "Nothing is deleted" in table_html(listed(few, group="deleted"))
    click(few, "delete", *uids(few, "one"))
    assert ">Deleted <b>1</b>" in filters_html(listed(few))
    gone = listed(few, group="deleted")
    html = table_html(gone)
    assert names(gone) == ["one"] and 'data-can="restore erase"' in html and "Delete {n} for good" in html
    assert listed(few, group="deleted", search="two").total == 0 and listed(few, search="one").total == 0
    # Also when nothing else is left, the way to them is shown.
    only = few
    for job in JobStore(few).jobs(states=("queued", "running")):
        act_on(few, "cancel", job.uid)
    JobStore(few).move(uids(few, "works")[0], "cancelled", actor="runner", attempt=1)
    click(only, "delete", *[job.uid for job in JobStore(few).jobs()])
    empty = listed(few)
    assert ">Deleted <b>4</b>" in filters_html(empty) and "No job matches" in table_html(empty)
    assert "Nothing is running" in title_html(empty)


def test_for_good_is_asked_with_what_it_frees_and_done_when_it_is_said_again(few):
    which = uids(few, "one", "two")
    for uid in which:
        (few.run_dir(uid)).mkdir(parents=True)
        (few.run_dir(uid) / "events.jsonl").write_bytes(bytes(600_000))
    _, _, said = click(few, "ask-erase", *which)
    assert "no deleted job" in said.value and "erase" not in said.value  # it must be deleted first
    _, _, said = click(few, "erase", *which)
    assert "Nothing was changed" in said.value and all(few.run_dir(uid).exists() for uid in which)
    click(few, "delete", *which)
    _, _, said = click(few, "ask-erase", *which)
    assert "Delete 2 jobs for good? 1.20 MB become free" in said.value and "There is no way back" in said.value
    assert 'data-act="erase"' in said.value and 'data-act="dismiss"' in said.value
    assert all(few.run_dir(uid).exists() for uid in which)
    _, _, said = click(few, "dismiss")
    assert said.visible is False and all(few.run_dir(uid).exists() for uid in which)
    _, _, said = click(few, "erase", *which)
    assert "2 jobs were deleted for good" in said.value and "1.20 MB became free" in said.value
    assert not any(few.run_dir(uid).exists() for uid in which)
    assert listed(few).deleted == 0 and listed(few, group="deleted").jobs == []
    assert JobStore(few).history(which[0])[-1]["reason"] == "deleted for good"


def test_a_jobs_own_page_deletes_and_restores_it(few):
    (uid,) = uids(few, "one")
    page = handlers(few, job_page)
    event = lambda act: gr.EventData(None, {"act": act, "uid": uid, "uids": ""})  # noqa: E731
    said, now = page["on_action"]({"uid": uid}, event("delete"), NOBODY)
    assert said.visible is False and JobStore(few).get(uid).deleted_at
    shown = " ".join(part.value or "" for part in page["show"](now) if isinstance(part, gr.HTML))
    assert "This job is deleted" in shown and 'data-act="restore"' in shown and 'data-act="resume"' not in shown
    page["on_action"]({"uid": uid}, event("restore"), NOBODY)
    assert JobStore(few).get(uid).deleted_at is None
    (waits,) = uids(few, "waits")
    event = gr.EventData(None, {"act": "delete", "uid": waits, "uids": uid})
    said, _ = page["on_action"]({"uid": waits}, event, NOBODY)
    assert "cancel it first" in said.value and JobStore(few).get(uid).deleted_at is None
