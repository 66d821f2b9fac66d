"""The form keeps the file: what is not changed in it stays as it was, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import ConfigError
from backend.schema import parse_yaml
from ui.draft import FIELDS, TEMPLATE, from_control, merge, open_draft, to_control

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


def changed(draft, **by_key):
    values = dict(zip((f.key for f in FIELDS), draft.shown, strict=True))
    values.update({key.replace("__", "."): value for key, value in by_key.items()})
    return list(values.values())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_an_example_passes_through_the_form_unchanged(path):
    text = path.read_text(encoding="utf-8")
    draft = open_draft(text)
    assert merge(draft, draft.shown).dump() == text


def test_the_template_is_a_valid_job():
    draft = open_draft(TEMPLATE)
    assert merge(draft, draft.shown).config.is_demo


def test_only_the_changed_value_is_written():
    text = (
        '# mine\nMODEL: "quantdeck/demo"   # the small one\nMYKEY: [1, 2]\nDATASET_NAME: quantdeck/demo\n'
        "ALGORITHM: AutoAWQ\nJOB_ID: 'a'\nllm:\n  AutoAWQ:\n    Q_GROUP_SIZE: 128 # wide\n"
    )
    draft = open_draft(text)
    out = merge(draft, changed(draft, llm__AutoAWQ__Q_GROUP_SIZE=32)).dump()
    assert out == text.replace("128 # wide", "32  # wide") or out == text.replace("128 # wide", "32 # wide")


def test_a_value_that_no_control_can_show_is_kept_and_reported():
    draft = open_draft(
        TEMPLATE.replace("Q_GROUP_SIZE: 128", "Q_GROUP_SIZE: 100").replace("ZERO_POINT: true", "ZERO_POINT: maybe")
    )
    document = merge(draft, draft.shown)
    assert document.values["llm"]["AutoAWQ"] == {
        "ZERO_POINT": "maybe",
        "W_BIT": 4,
        "Q_GROUP_SIZE": 100,
        "VERSION": "GEMM",
    }
    with pytest.raises(ConfigError) as caught:
        _ = document.config
    assert {e.key for e in caught.value.errors} == {"llm.AutoAWQ.Q_GROUP_SIZE", "llm.AutoAWQ.ZERO_POINT"}


def test_a_section_is_made_when_its_first_value_is_set():
    draft = open_draft(TEMPLATE)
    config = merge(
        draft, changed(draft, CALIBRATION__SAMPLES=16, EVALUATION__TASKS="arc_easy:5:20, quantdeck_demo")
    ).config
    assert config.CALIBRATION.SAMPLES == 16
    assert [str(task) for task in config.EVALUATION.TASKS] == ["arc_easy:5:20", "quantdeck_demo:0"]


def test_no_tasks_and_default_tasks_are_different():
    draft = open_draft(TEMPLATE)
    assert merge(draft, changed(draft, EVALUATION__TASKS="[]")).config.EVALUATION.TASKS == []
    assert merge(draft, draft.shown).config.EVALUATION.TASKS is None


def test_emptied_text_is_written_as_an_empty_value():
    draft = open_draft(TEMPLATE.replace("DATA_PATH:", 'DATA_PATH: "x.jsonl"'))
    document = merge(draft, changed(draft, DATA_PATH=""))
    assert document.values["DATA_PATH"] is None
    assert "DATA_PATH:\n" in document.dump()


@pytest.mark.parametrize("text", ["- a list", "a: [", "", "x: !!python/object/apply:os.system [ls]"])
def test_what_is_no_job_file_is_refused(text):
    with pytest.raises(ConfigError):
        open_draft(text)


@pytest.mark.parametrize("field", FIELDS, ids=lambda f: f.key)
def test_every_default_survives_its_control(field):
    shown = to_control(field.spec, field.spec.default)
    assert from_control(field.spec, shown) == field.spec.default


def test_clone_of_a_full_file_shows_its_values():
    draft = open_draft(EXAMPLES[-1].read_text(encoding="utf-8"))
    shown = dict(zip((f.key for f in FIELDS), draft.shown, strict=True))
    values = parse_yaml(draft.text).values
    assert shown["MODEL"] == values["MODEL"]
    assert shown["llm.AutoAWQ.VERSION"] == values["llm"]["AutoAWQ"]["VERSION"]
