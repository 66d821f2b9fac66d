"""The log on a job's page: what the browser gets for a cursor, however long, wild or damaged the log is."""

from __future__ import annotations

import re

import pytest

from backend.jobs import control
from backend.jobs.logs import tail as tail_module
from backend.jobs.logs.writer import LogWriter
from backend.jobs.store import JobStore
from backend.schema import parse_yaml
from backend.settings import JobSettings
from ui import logview
from ui.draft import TEMPLATE
from ui.logview import MAX_ANSWER, MAX_LINE, bounded, found_in, log_after

WILD = (
    '<script>alert(1)</script> \x1b[31mred\x1b[0m \x1b]8;;http://x\x07link \u202egpj.exe\u2066 \x00 <img onerror="x">'
)
LOUD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture
def job(home):
    job = JobStore(home).create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    control.log_path(home, job.uid).parent.mkdir(parents=True)
    return job


def ask(home, job, cursor=None):
    answer = log_after(home, {"uid": job.uid, "cursor": cursor})
    assert "error" not in answer, answer
    return answer


def write(home, job, text, mode="a"):
    with open(control.log_path(home, job.uid), mode, encoding="utf-8") as file:
        file.write(text)


def test_lines_come_once_and_in_order(home, job):
    assert ask(home, job)["lines"] == []
    write(home, job, "one\ntwo\nthr")
    first = ask(home, job)
    write(home, job, "ee\nfour\n")
    second = ask(home, job, first["cursor"])
    assert first["lines"] + second["lines"] == ["one", "two", "three", "four"]
    assert ask(home, job, second["cursor"])["lines"] == []
    assert first["active"] and first["address"] == f"/download/{job.uid}.log"


def test_a_reload_begins_with_the_end_of_a_long_log(home, job):
    write(home, job, "".join(f"line {i}\n" for i in range(200_000)))
    fresh = ask(home, job)
    assert fresh["lines"][-1] == "line 199999"
    assert len("\n".join(fresh["lines"])) <= MAX_ANSWER
    assert 10_000 < len(fresh["lines"]) < 30_000


def test_no_line_is_lost_or_doubled_while_the_log_is_rotated(home, job):
    path = control.log_path(home, job.uid)
    writer = LogWriter(path, JobSettings(log_bytes=64 * 1024, log_files=4))
    seen, cursor = [], None
    try:
        for i in range(3_000):
            writer.write(f"line {i} {'x' * 40}\n".encode())
            if i % 500 == 499:
                answer = ask(home, job, cursor)
                seen, cursor = [*seen, *answer["lines"]], answer["cursor"]
    finally:
        writer.close()
    seen += ask(home, job, cursor)["lines"]
    numbers = [int(line.split()[1]) for line in seen if line.startswith("line ")]
    assert path.with_name("log.log.1").exists()
    assert numbers == list(range(3_000))


def test_more_than_fits_is_cut_and_counted():
    lines = ["x" * 99] * 5_000
    kept, cut = bounded(lines)
    assert len(kept) == MAX_ANSWER // 100 and cut == 5_000 - len(kept)
    assert bounded([]) == ([], 0)
    assert len(bounded(["x" * 10_000_000])[0]) == 1  # it is cut to MAX_LINE when it is shown


def test_a_wild_log_becomes_inert_lines(home, job):
    write(home, job, WILD + "\n" + "y" * 50_000 + "\n")
    with open(control.log_path(home, job.uid), "ab") as file:
        file.write(b"\xff\xfe not utf-8 \xed\xa0\x80\n")
    answers = (ask(home, job), found_in(home, {"uid": job.uid, "text": "script"}))
    for answer in answers:
        assert not any(LOUD.search(line) for line in answer["lines"])
        assert "<script>alert(1)</script> ␛[31mred" in answer["lines"][0]  # text: the browser makes no HTML of it
    assert len(answers[0]["lines"][1]) <= MAX_LINE + 4
    assert "innerHTML" not in logview.LOG_JS and "insertAdjacentHTML" not in logview.LOG_JS


@pytest.mark.parametrize(
    "asked",
    [
        None, [], "x", 3, {}, {"uid": ["a"]}, {"uid": {"a": 1}, "cursor": 3}, {"uid": "no-such"},
        {"uid": "../../etc/passwd"}, {"uid": "' OR 1=1 --"}, {"uid": "x" * 10_000}, {"uid": "\ud800"},
    ],
)  # fmt: skip
def test_a_crafted_request_is_answered_with_an_error(home, job, asked):
    for answer in (log_after(home, asked), found_in(home, asked)):
        assert set(answer) == {"error"} and answer["error"]


@pytest.mark.parametrize("cursor", [5, ["a"], {"a": 1}, "x" * 10_000])
def test_a_cursor_that_is_none_is_refused(home, job, cursor):
    assert set(log_after(home, {"uid": job.uid, "cursor": cursor})) == {"error"}


@pytest.mark.parametrize("cursor", ["nonsense", "1-2-3", "-1--2--3", "ffffffffffffffffffff-0-0", "0-0-0"])
def test_a_cursor_of_elsewhere_leads_to_the_end_of_the_log(home, job, cursor):
    write(home, job, "one\ntwo\n")
    assert ask(home, job, cursor)["lines"][-2:] == ["one", "two"]


def test_the_whole_log_is_searched(home, job):
    path = control.log_path(home, job.uid)
    path.with_name("log.log.1").write_text("an old needle\nhay\n")
    write(home, job, "hay\n" * 100_000 + "a new NEEDLE\n")
    found = found_in(home, {"uid": job.uid, "text": " needle "})
    assert found == {"lines": ["an old needle", "a new NEEDLE"], "more": False}
    many = found_in(home, {"uid": job.uid, "text": "hay"})
    assert len(many["lines"]) == logview.MAX_FOUND and many["more"]
    assert found_in(home, {"uid": job.uid, "text": ""})["lines"] == []


def test_only_a_few_search_at_once(home, job):
    write(home, job, "hay\n")
    for _ in range(2):
        assert logview._searches.acquire(blocking=False)
    try:
        assert "other searches" in found_in(home, {"uid": job.uid, "text": "hay"})["error"]
    finally:
        for _ in range(2):
            logview._searches.release()
    assert found_in(home, {"uid": job.uid, "text": "hay"})["lines"] == ["hay"]


def test_many_readers_cost_one_read_of_what_is_new(home, job):
    write(home, job, "one\n")
    cursors = [ask(home, job)["cursor"] for _ in range(20)]
    write(home, job, "two\n")
    before = tail_module._followed(control.log_path(home, job.uid)).reads
    assert all(ask(home, job, cursor)["lines"] == ["two"] for cursor in cursors)
    assert tail_module._followed(control.log_path(home, job.uid)).reads - before <= 1
