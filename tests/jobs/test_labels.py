"""Tags and notes: what is allowed, what is found by them, and the order of a list."""

from __future__ import annotations

import json

import pytest

from backend import cli
from backend.errors import ConfigError, JobError
from backend.jobs import labels, listing
from backend.jobs.store import JobStore
from tests.jobs.stored import make, start


def names(jobs):
    return [job.job_id for job in jobs]


# -- what is allowed


@pytest.mark.parametrize(
    ("words", "tags"),
    [("", ()), ("Sweep", ("sweep",)), ("b, a  b", ("a", "b")), ("w4a16_g128 v1.0-rc", ("v1.0-rc", "w4a16_g128"))],
)
def test_tags_are_small_sorted_and_each_there_once(words, tags):
    assert labels.read_tags(words) == tags


@pytest.mark.parametrize("words", ["a/b", "-old", "+x", "ümlaut", "x" * 33, "<b>", "tag:x", "a\x00b", "\ud800", "%"])
def test_a_tag_that_is_none_is_named_with_what_is_allowed(words):
    with pytest.raises(ConfigError, match="tags: found .*letters a to z, digits") as caught:
        labels.read_tags(words)
    assert caught.value.key == "tags"


def test_a_job_has_a_bounded_number_of_tags_however_they_come(home):
    job = make(JobStore(home))
    with pytest.raises(ConfigError, match="found 13 tags; a job has at most 12"):
        labels.read_tags([f"t{i}" for i in range(13)])
    labels.change(home, job.uid, tags=[f"t{i}" for i in range(12)])
    with pytest.raises(ConfigError, match="13 tags"):
        labels.change(home, job.uid, add=["one-more"])
    assert len(labels.change(home, job.uid, add=["one-more"], remove=["t0"]).tags) == 12


def test_a_note_is_plain_text_of_bounded_length_without_secrets(home):
    job = make(JobStore(home))
    kept = labels.change(home, job.uid, note="  best so far\r\nsee <b>this</b> \U0001f600\n").note
    assert kept == "best so far\nsee <b>this</b> \U0001f600"
    assert labels.change(home, job.uid, note="x" * 2000).note == "x" * 2000
    for bad in ("x" * 2001, "a\x1b[31m", "\ud800"):
        with pytest.raises(ConfigError, match="note: found"):
            labels.change(home, job.uid, note=bad)
    assert JobStore(home).get(job.uid).note == "x" * 2000
    assert "hf_" not in labels.change(home, job.uid, note="the token is hf_abcdefghijklmnopqrstuvwxyz123456").note


def test_what_is_not_given_stays_and_a_mistake_changes_nothing(home):
    job = make(JobStore(home))
    labels.change(home, "one", tags="a b", note="n")
    assert labels.change(home, "one", add=["c"], remove=["a", "never-there"]).tags == ("b", "c")
    with pytest.raises(ConfigError):
        labels.change(home, "one", add=["d", "?"], note="other")
    again = JobStore(home).get(job.uid)
    assert (again.tags, again.note) == (("b", "c"), "n")
    assert labels.change(home, "one", tags=(), note="").tags == ()
    assert JobStore(home).history(job.uid)[-1]["to_state"] == "queued"  # labels are no change of state
    with pytest.raises(JobError, match="no job"):
        labels.change(home, "nobody", tags="a")


def test_a_running_job_can_be_labelled_and_goes_on(home):
    store = JobStore(home)
    job = make(store)
    assert start(store, job, "cpu:0")
    labels.change(home, job.uid, tags="live")
    assert store.update(job.uid, 1, progress={"stage": "quantize"}) and store.beat(job.uid, 1)
    assert store.get(job.uid).tags == ("live",) and store.get(job.uid).progress == {"stage": "quantize"}


# -- what is found


def test_tags_and_notes_are_searched_and_a_tag_matches_as_a_whole(home):
    store = JobStore(home)
    for name, tags, note in (("a", "sweep old", ""), ("b", "sweeping", "see a_b"), ("c", "sweep", "100 % Done")):
        labels.change(home, make(store, name).uid, tags=tags, note=note)
    found = lambda text: names(store.jobs(search=text))  # noqa: E731
    assert found("tag:sweep") == ["c", "a"] and found("TAG:Sweep") == ["c", "a"]
    assert found("tag:sweep tag:old") == ["a"] and found("tag:swee") == []
    assert found("sweep") == ["c", "b", "a"] and found("done") == ["c"] and found("a_b") == ["b"]
    assert found("tag:sweep demo") == ["c", "a"] and found("100 %") == ["c"] and found("tag:sweep see") == []
    assert found("tag:") == ["c", "b", "a"] and found("tag:%") == [] and found("tag:' OR 1=1") == []
    assert store.count(search="tag:sweep") == 2 and len(store.summaries(search="tag:old")) == 1


def test_a_search_is_taken_apart():
    assert listing.split_search("  two  words ") == ("two  words", [])
    assert listing.split_search("x tag:A tag: y") == ("x y", ["a"])
    assert listing.split_search("vintage:x") == ("vintage:x", [])


# -- the order


def test_lists_are_sorted_both_ways_and_what_has_no_value_comes_last(home):
    store = JobStore(home)
    jobs = {name: make(store, name) for name in ("b", "C", "a", "d")}
    for name, begin, end in (("b", "05", "06"), ("C", "01", "04"), ("a", "02", "03")):
        with store.writing() as db:
            db.execute(
                "UPDATE jobs SET started_at = ?, finished_at = ?, state = 'failed' WHERE uid = ?",
                [f"2026-01-01T{begin}:00:00.000+00:00", f"2026-01-01T{end}:00:00.000+00:00", jobs[name].uid],
            )
    order = lambda sort: "".join(names(store.summaries(sort=sort)))  # noqa: E731
    assert order("") == "daCb"
    assert order("name") == "abCd" and order("-name") == "dCba"
    assert (
        order("time") == "abCd" and order("-time") == "Cabd"
    )  # d has not run: last both ways, alike ones newest first
    assert order("started") == "Cabd" and order("state") == "daCb" and order("-state") == "aCbd"
    assert order("algorithm") == "daCb"
    assert names(store.summaries(sort="name", limit=2, offset=1)) == ["b", "C"]


@pytest.mark.parametrize("sort", ["uid; DROP TABLE jobs", "--name", "Name", "-", "result", "name,uid"])
def test_only_what_is_listed_is_sorted_by(home, sort):
    assert not listing.is_sort(sort)
    with pytest.raises(ValueError, match="sorted by one of name, state"):
        JobStore(home).jobs(sort=sort)


# -- the command


def test_the_command_shows_and_changes_labels(home, capsys):
    make(JobStore(home))
    at = ["--home", str(home.root)]
    assert cli.main(["tag", "one", "--add", "sweep", "old", "--note", "to be\nseen", *at]) == 0
    assert "old sweep" in capsys.readouterr().out
    assert cli.main(["tag", "one", "--remove", "old", *at]) == 0
    assert cli.main(["tag", "one", *at]) == 0
    assert "job one: sweep\nto be\nseen\n" in capsys.readouterr().out
    assert cli.main(["tag", "one", "--add", "a/b", *at]) == 2
    assert "tags: found 'a/b'" in capsys.readouterr().err
    assert cli.main(["jobs", "--json", "--search", "tag:sweep", *at]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["tags"], told["note"], told["deleted_at"]) == (["sweep"], "to be\nseen", None)
    assert cli.main(["jobs", "--search", "tag:old", *at]) == 0 and "one" not in capsys.readouterr().out.split()
