"""The review tells what a form will do, or what is wrong and at which control."""

from __future__ import annotations

import html
import re

import pytest

from backend.demo import MODEL_DIR
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from backend.sources.models import model_facts
from tests.security.site import finish
from ui.differences import differences
from ui.draft import FIELDS, TEMPLATE, open_draft
from ui.fields import plain_info
from ui.marks import messages_by_key
from ui.review import model_html, review, review_html
from ui.yamlview import yaml_html


def looked_at(home: Home, text: str):
    draft = open_draft(text)
    return review(home, draft, draft.shown)


def messages_of(home: Home, text: str):
    draft = open_draft(text)
    return messages_by_key(review(home, draft, draft.shown).problems, draft, draft.shown)


def test_the_template_can_start(home):
    found = looked_at(home, TEMPLATE)
    assert found.problems == () and found.checked is not None
    assert found.text == TEMPLATE
    assert "What this job will do" in review_html(found)
    assert not home.jobs_db.exists() or JobStore(home).jobs() == []


def test_each_result_stands_there_with_its_size(home):
    html = review_html(looked_at(home, TEMPLATE.replace("W_BIT: 4", "W_BIT: [4, 3]")))
    for words in ("2, from one pass", "AWQ 4 bit, groups of 128", "AWQ 3 bit, groups of 128"):
        assert words in html
    assert html.count(" % of ") == 2


def test_an_exception_that_is_wrong_stands_at_its_control(home):
    text = TEMPLATE.replace('ALGORITHM: "AutoAWQ"', 'ALGORITHM: "Native"')
    text = text.replace("llm:\n", "llm:\n  Native: {OVERRIDES: [{PATTERN: '*.c_proj', W_BIT: 8}]}\n")
    told = messages_of(home, text)["llm.Native.OVERRIDES"]
    assert told.startswith("Line ") and "matches no Linear" in told


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ('JOB_ID: "my-first-job"', 'JOB_ID: "../x"', "JOB_ID", "starts with a letter"),
        ("Q_GROUP_SIZE: 128", "Q_GROUP_SIZE: 100", "llm.AutoAWQ.Q_GROUP_SIZE", "100"),
        ('MODEL: "quantdeck/demo"', 'MODEL: "/etc"', "MODEL", "inside"),
        ("DATA_PATH:", 'DATA_PATH: "/etc/passwd"', "DATA_PATH", "inside"),
        ('SPLIT: "train"', 'SPLIT: "nothing"', "SPLIT", "nothing"),
        ('TASK: "llm"', 'EVALUATION: {TASKS: ["../x.yaml"]}', "EVALUATION.TASKS", "task name"),
    ],
)
def test_a_problem_stands_at_its_control(home, old, new, key, words):
    text = TEMPLATE.replace(old, new)
    assert looked_at(home, text).checked is None
    line = 1 + next(number for number, one in enumerate(text.split("\n")) if new in one)
    told = messages_of(home, text)[key]
    assert told.startswith(f"Line {line}: ") and words in told


def test_a_value_that_was_typed_has_no_line_of_the_file_that_was_opened(home):
    draft = open_draft(TEMPLATE)
    values = ["a b" if field.key == "JOB_ID" else shown for field, shown in zip(FIELDS, draft.shown, strict=True)]
    told = messages_by_key(review(home, draft, values).problems, draft, values)["JOB_ID"]
    assert told.startswith("found 'a b'")


def test_a_checkbox_with_a_wrong_value_is_told_with_its_line(home):
    draft = open_draft(TEMPLATE.replace("ZERO_POINT: true", "ZERO_POINT: maybe"))
    drawn = [False if shown is None else shown for shown in draft.shown]
    told = messages_by_key(review(home, draft, drawn).problems, draft, drawn)["llm.AutoAWQ.ZERO_POINT"]
    assert told.startswith("Line ") and "found 'maybe'" in told


def test_a_taken_name_is_told_with_a_free_one(home):
    JobStore(home).create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    assert "my-first-job-2" in messages_of(home, TEMPLATE)["JOB_ID"]


def test_what_was_typed_never_becomes_html(home):
    evil = "<img src=x onerror=alert(1)>"
    found = looked_at(home, TEMPLATE.replace("my-first-job", evil))
    assert "<img" not in review_html(found) and "<img" not in yaml_html(found.text, evil, evil)
    assert "<img" not in model_html(home, evil, "")


def test_messages_have_no_marks_that_gradio_reads():
    marks = re.compile(r"`([^`]+)`|\[([^\]]+)\]\(([^)]+)\)|\*(.+?)\*|__(.+?)__|(?<!\w)_(.+?)_(?!\w)")
    for text in ("**a** <b> [x](y)", "`c` *d* _e_ __f__", "a_b_c 2 * 3, {PATTERN: '*.x'}, 'y.*'", "___", "_a b_"):
        assert not marks.search(plain_info(text)) and len(plain_info(text)) <= len(text) + 1
    same = "Line 3: found 'max_seq_length'; at most 2 * 4 (see [models] allow_pickle)"
    assert plain_info(same) == same


def test_comments_and_keys_are_told_apart():
    html = yaml_html('# top\nKEY: "a # b"  # note\n', "x.yaml", "File")
    assert "<i># top</i>" in html and "<i># note</i>" in html
    assert "<b>KEY</b>: &quot;a # b&quot;" in html


def test_settings_that_differ_from_the_defaults_are_marked_and_named():
    text = TEMPLATE.replace("W_BIT: 4", "W_BIT: 3") + "CALIBRATION:\n  PACKING: sample # note\n  SAMPLES: 128\nOWN: 1\n"
    found = {one.key: one for one in differences(text)}
    assert found["llm.AutoAWQ.W_BIT"].default == "4" and found["CALIBRATION.PACKING"].default == "join"
    assert not set(found) & {"MODEL", "JOB_ID", "llm.AutoAWQ.Q_GROUP_SIZE", "CALIBRATION.SAMPLES", "SPLIT", "OWN"}
    lines = text.splitlines()
    assert lines[found["llm.AutoAWQ.W_BIT"].line].strip() == "W_BIT: 3"
    shown = yaml_html(text, "x.yaml", "File", differences(text))
    assert '<mark class="qd-differs" title="default: join">  <b>PACKING</b>: sample <i># note</i></mark>' in shown
    assert shown.count("<mark") == len(found)
    assert f"{len(found)} settings differ from the defaults" in shown and "llm.AutoAWQ.W_BIT (default: 4)" in shown
    assert "<mark" not in yaml_html(text, "x.yaml", "File") and differences("a: [") == []


def test_the_marked_file_is_copied_as_it_is():
    text = TEMPLATE.replace("W_BIT: 4", "W_BIT: 3")
    shown = yaml_html(text, "x.yaml", "File", differences(text)).split('tabindex="0">')[1].split("</pre>")[0]
    assert html.unescape(re.sub("<[^>]+>", "", shown)) == text.rstrip()


def test_time_and_memory_are_told_from_an_earlier_job_only(home):
    first = looked_at(home, TEMPLATE)
    assert "no basis yet" in review_html(first)
    job = JobStore(home).create(TEMPLATE, first.config, device=first.checked.device)
    weights = model_facts(MODEL_DIR).weight_bytes
    rows = [{"metric": "size", "baseline": weights / 1e6, "quantized": weights / 3e6, "unit": "MB"}]
    timings = {"download": {"wall_s": 5.0}, "calibrate": {"wall_s": 20.0}, "quantize": {"wall_s": 10.0},
               "evaluate_baseline": {"wall_s": 99.0}}  # fmt: skip
    result = {"rows": rows, "timings": timings, "peak_rss_bytes": 2_000_000_000}
    finish(home, job, result)
    again = TEMPLATE.replace("my-first-job", "second")
    told = review_html(looked_at(home, again))
    assert "about 30 s to quantize, peak memory 2.00 GB, going by job my-first-job" in told
    twice = looked_at(home, again + "CALIBRATION: {SAMPLES: 64, SEQUENCE_LENGTH: 2048}\n")
    assert "about 1 min 00 s to quantize, going by" in review_html(twice)
    assert "no basis yet" in review_html(looked_at(home, again.replace("W_BIT: 4", "W_BIT: 3")))
