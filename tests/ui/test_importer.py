"""Opening a job file tells what was found in it, through the page's own handlers."""

from __future__ import annotations

import html
import json
import re

import gradio as gr
import pytest

from backend.schema import parse_yaml
from tests.conftest import EXAMPLES
from tests.schema.test_reading import WRONG
from ui.draft import FIELDS, TEMPLATE, merge, open_draft
from ui.importer import FILE_TYPES, only_changes, opened, unopened
from ui.importview import MOST_SHOWN

EVIL = "<img src=x onerror=alert(1)>"


def plain(update) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", update.value)))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_an_examples_report_has_no_complaint_and_its_form_gives_it_back(path):
    text = path.read_text(encoding="utf-8")
    draft, report, *shown = opened(text, path.name)
    assert f"{path.name} is in the form" in plain(report) and " understood: Model 1" in plain(report)
    assert "wrong" not in plain(report).replace("10000, the original's default, is wrong", "")
    assert "not known" not in plain(report)
    assert merge(draft, shown).dump() == text


def test_everything_that_is_odd_is_told_with_its_line():
    draft, report, *shown = opened(WRONG, "mine.yaml")
    told = plain(report)
    assert "3 settings are wrong: the message stands at each control" in told
    assert "line 9 llm.AutoAWQ.Q_GROUP_SIZE : found 100; allowed: 128, 64 or 32" in told
    assert "2 keys are not known here: kept in the file, without effect" in told
    assert "line 4 MODLE : did you mean MODEL?" in told
    assert (
        "2 lines are kept for other programs, and not read" in told
        and "line 12 llm.AQLM : ALGORITHM is AutoAWQ" in told
    )
    assert "settings are other than the default" in told and "line 2 DATASET_NAME (default: empty)" in told
    assert merge(draft, shown).dump() == WRONG


def test_a_key_that_is_missing_has_no_line():
    told = plain(opened("MODEL: x\nALGORITHM: AutoAWQ\nDATASET_NAME: y\n", "x")[1])
    assert "not in the file JOB_ID : this key is required" in told


def test_json_becomes_yaml_and_is_told_so():
    values = parse_yaml((EXAMPLES / "aqlm_guide.yaml").read_text(encoding="utf-8")).values
    draft, report, *shown = opened(json.dumps(values, indent="\t"), "mine.json")
    assert "It was JSON; from here on it is YAML." in plain(report)
    assert merge(draft, shown).values == values and draft.text.startswith('MODEL: "')
    assert ".json" in FILE_TYPES


def test_a_file_that_cannot_be_read_leaves_the_form_as_it_is():
    draft, report, *shown = opened('MODEL: x\nB: "a\nC: <b>: 2\n', "bad.yaml")
    assert draft == gr.skip() and shown == [gr.skip()] * len(FIELDS)
    told = plain(report)
    assert "bad.yaml was not opened" in told and "column" in told and "The form is as it was before" in told
    report = opened("A: 1\n  <b>: {x: 1\nC: 2\n", "x")[1].value
    assert "  &lt;b&gt;: {x: 1\n" in report and re.search(r"\n +\^</pre>", report)
    assert unopened()[1] == gr.skip()


def test_nothing_of_a_file_becomes_html():
    text = f'"{EVIL}": 1\nMODEL: "{EVIL}"\nALGORITHM: "{EVIL}"\nllm:\n  "{EVIL}": 2\nJOB_PATH: "{EVIL}"\n'
    for shown in (
        opened(text, EVIL)[1].value,
        opened(f"{EVIL}: [", EVIL)[1].value,
        opened(f'{{"{EVIL}": 1,,}}', EVIL)[1].value,
    ):
        assert "<img" not in shown and "&lt;img" in shown


def test_a_long_list_of_remarks_is_cut():
    text = "".join(f"KEY{number}: 1\n" for number in range(500))
    told = opened(text, "long")[1].value
    assert f"and {500 - MOST_SHOWN} more" in told and len(told) < 20_000


def test_only_what_changes_is_drawn_anew():
    text = TEMPLATE.replace("W_BIT: 4", "W_BIT: [4, 3]")
    before = open_draft(TEMPLATE)
    draft, report, *shown = only_changes(opened(text, "mine.yaml"), before.shown)
    sent = {field.key: value for field, value in zip(FIELDS, shown, strict=True) if value != gr.skip()}
    assert sent == {"llm.AutoAWQ.W_BIT": [4, 3]} and draft.text == text
    # A number for a flag is another value, although Python has them equal.
    flags = [1 if value is True else value for value in draft.shown]
    again = only_changes([draft, report, *draft.shown], flags)[2:]
    changed = [field.key for field, value in zip(FIELDS, again, strict=True) if value != gr.skip()]
    assert changed == [field.key for field, value in zip(FIELDS, draft.shown, strict=True) if value is True]
