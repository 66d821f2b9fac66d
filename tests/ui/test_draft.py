"""The form keeps the file: what is not changed in it stays as it was, to the letter."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import ConfigError, ConfigErrors
from backend.schema import parse_yaml
from ui.draft import FIELDS, TEMPLATE, UNSET, from_control, merge, open_draft, to_control

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
    out = merge(draft, changed(draft, llm__AutoAWQ__Q_GROUP_SIZE=[32])).dump()
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


@pytest.mark.parametrize(
    ("line", "wrong", "key", "pick", "written"),
    [
        ("ZERO_POINT: true", "ZERO_POINT: maybe", "llm.AutoAWQ.ZERO_POINT", True, True),
        ("W_BIT: 4", "W_BIT: [4, 5]", "llm.AutoAWQ.W_BIT", [4], 4),
        ('VERSION: "GEMM"', "VERSION: MARLIN", "llm.AutoAWQ.VERSION", "GEMM", "GEMM"),
        ('SPLIT: "train"', "SPLIT: 2024", "SPLIT", "2024", "2024"),
        ('TASK: "llm"', 'CALIBRATION: {SAMPLES: "8"}', "CALIBRATION.SAMPLES", "8", 8),
        ('TASK: "llm"', "CALIBRATION: {SAMPLES: 8.0}", "CALIBRATION.SAMPLES", "8", 8),
        (
            'TASK: "llm"',
            "EVALUATION: {PROTOCOLS: [full_window, x]}",
            "EVALUATION.PROTOCOLS",
            ["full_window"],
            ["full_window"],
        ),
    ],
)
def test_a_wrong_value_can_be_put_right_in_the_form(line, wrong, key, pick, written):
    """Its control shows nothing, so that any choice differs from what it shows, the default as well."""
    text = TEMPLATE.replace(line, wrong)
    draft = open_draft(text)
    assert dict(zip((f.key for f in FIELDS), draft.shown, strict=True))[key] in (None, "", [])
    assert merge(draft, draft.shown).dump() == text
    document = merge(draft, changed(draft, **{key.replace(".", "__"): pick}))
    value = document.values
    for part in key.split("."):
        value = value[part]
    assert value == written and document.config


def test_a_checkbox_that_is_only_drawn_does_not_change_a_wrong_value():
    text = TEMPLATE.replace("ZERO_POINT: true", "ZERO_POINT: maybe")
    draft = open_draft(text)
    assert merge(draft, changed(draft, llm__AutoAWQ__ZERO_POINT=False)).dump() == text


def test_numbers_that_are_taken_as_text_are_shown():
    draft = open_draft(TEMPLATE.replace('JOB_ID: "my-first-job"', "JOB_ID: 7").replace('CUDA_ID: "0"', "CUDA_ID: 0"))
    shown = dict(zip((f.key for f in FIELDS), draft.shown, strict=True))
    assert (shown["JOB_ID"], shown["CUDA_ID"]) == ("7", "0") and merge(draft, draft.shown).config.JOB_ID == "7"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_one_changed_control_changes_one_line_of_an_example(path):
    text = path.read_text(encoding="utf-8")
    draft = open_draft(text)
    before, after = text.split("\n"), merge(draft, changed(draft, JOB_ID="another")).dump().split("\n")
    (pair,) = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert pair[0].startswith("JOB_ID:") and pair[1] == 'JOB_ID: "another"'


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
    draft = open_draft(next(p for p in EXAMPLES if p.name == "awq_guide.yaml").read_text(encoding="utf-8"))
    shown = dict(zip((f.key for f in FIELDS), draft.shown, strict=True))
    values = parse_yaml(draft.text).values
    assert shown["MODEL"] == values["MODEL"]
    assert shown["llm.AutoAWQ.VERSION"] == values["llm"]["AutoAWQ"]["VERSION"]


def test_one_choice_is_written_plain_and_several_as_a_list():
    draft = open_draft(TEMPLATE)
    several = merge(draft, changed(draft, llm__AutoAWQ__W_BIT=[4, 3], llm__AutoAWQ__Q_GROUP_SIZE=[64]))
    assert "    W_BIT: [4, 3]\n    Q_GROUP_SIZE: 64\n" in several.dump()
    again = open_draft(several.dump())
    assert merge(again, again.shown).dump() == several.dump()
    back = merge(again, changed(again, llm__AutoAWQ__W_BIT=[4]))
    assert "    W_BIT: 4\n" in back.dump()
    emptied = merge(again, changed(again, llm__AutoAWQ__W_BIT=[]))
    assert emptied.values["llm"]["AutoAWQ"]["W_BIT"] is None and emptied.config.algorithm_settings.W_BIT == 4


def test_a_list_of_one_stays_as_it_was_written():
    text = TEMPLATE.replace("W_BIT: 4", "W_BIT: [ 4 ]")
    draft = open_draft(text)
    assert merge(draft, draft.shown).dump() == text


def test_a_choice_can_be_left_to_its_default_again():
    text = TEMPLATE.replace('"AutoAWQ"\n', '"LLMCompressor"\n') + "  \n"
    draft = open_draft(text.replace("llm:\n", "llm:\n  LLMCompressor: {GROUP_SIZE: 64}\n"))
    assert dict(zip((f.key for f in FIELDS), draft.shown, strict=True))["llm.LLMCompressor.GROUP_SIZE"] == 64
    document = merge(draft, changed(draft, llm__LLMCompressor__GROUP_SIZE=UNSET))
    assert document.config.algorithm_settings.GROUP_SIZE is None


EXCEPTIONS = "{PATTERN: '*.down_proj', W_BIT: 8}, {PATTERN: model.layers.0.*, KEEP: True}"


def test_exceptions_are_a_line_of_yaml():
    draft = open_draft(TEMPLATE.replace('ALGORITHM: "AutoAWQ"', 'ALGORITHM: "Native"'))
    document = merge(draft, changed(draft, llm__Native__OVERRIDES=EXCEPTIONS))
    rows = document.config.algorithm_settings.OVERRIDES
    assert [(r.PATTERN, r.W_BIT, r.KEEP) for r in rows] == [("*.down_proj", 8, False), ("model.layers.0.*", None, True)]
    again = open_draft(document.dump())
    shown = dict(zip((f.key for f in FIELDS), again.shown, strict=True))["llm.Native.OVERRIDES"]
    assert shown == '{PATTERN: "*.down_proj", W_BIT: 8}, {PATTERN: "model.layers.0.*", KEEP: True}'
    assert merge(again, again.shown).dump() == document.dump()
    assert merge(again, changed(again, llm__Native__OVERRIDES="")).config.algorithm_settings.OVERRIDES == []


@pytest.mark.parametrize("typed", ["{PATTERN: [", "some words", "{PATTERN: x}", "&a [*a]", "!!python/name:os.system"])
def test_exceptions_that_cannot_be_read_are_reported_at_their_control(typed):
    draft = open_draft(TEMPLATE.replace('ALGORITHM: "AutoAWQ"', 'ALGORITHM: "Native"'))
    with pytest.raises(ConfigErrors) as caught:
        _ = merge(draft, changed(draft, llm__Native__OVERRIDES=typed)).config
    assert all(e.key.startswith("llm.Native.OVERRIDES") for e in caught.value.errors)


@pytest.mark.parametrize(
    ("typed", "written"),
    [
        ("", None), ("  ", None), ("64", 64), (" 64 ", 64), (64, 64), ("2.0", 2), ("0.5", 0.5), (".5", 0.5),
        ("1e-9", 1e-9),
        ("-1", -1), ("many", "many"), ("1,000", "1,000"), ("1e400", "1e400"), ("nan", "nan"), ("0x10", "0x10"),
        ("9007199254740993", 9007199254740993),
    ],
)  # fmt: skip
def test_numbers_are_typed_as_text_and_what_is_none_is_kept_for_the_schema_to_refuse(typed, written):
    spec = next(field.spec for field in FIELDS if field.key == "EVALUATION.MAX_WINDOWS")
    found = from_control(spec, typed)
    assert found == written and type(found) is type(written)


def test_a_file_with_words_for_a_number_shows_them_and_keeps_them():
    text = TEMPLATE + "CALIBRATION:\n  SAMPLES: many  # to be decided\nEVALUATION:\n  MAX_WINDOWS:\n"
    draft = open_draft(text)
    shown = dict(zip((field.key for field in FIELDS), draft.shown, strict=True))
    assert shown["CALIBRATION.SAMPLES"] == "many"
    assert shown["EVALUATION.MAX_WINDOWS"] == ""
    assert merge(draft, draft.shown).dump() == text
