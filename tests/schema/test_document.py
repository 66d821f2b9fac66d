"""Job files: read without loss, changed without loss, refused with the key and the value."""

import itertools

import pytest

from backend.errors import ConfigError, ConfigErrors
from backend.schema import new_document, parse_yaml
from tests.conftest import demo_text

BILLION_LAUGHS = "a: &a [1]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in itertools.pairwise("abcdefgh")
)


def test_the_guides_file_is_valid_and_comes_back_byte_for_byte(guide_text):
    document = parse_yaml(guide_text)
    assert document.config.MODEL == "meta-llama/Meta-Llama-3.1-8B-Instruct"
    assert document.config.algorithm_settings.VERSION == "GEMV"
    assert document.config.CUDA_ID == "0"
    assert document.config.DATA_PATH is None
    assert document.warnings == []
    assert document.dump() == guide_text


def test_setting_the_same_value_changes_nothing(guide_text):
    document = parse_yaml(guide_text)
    document.set(("llm", "AutoAWQ", "W_BIT"), 4)
    document.set(("JOB_ID",), "awq_quantization")
    assert document.dump() == guide_text


def test_one_changed_value_keeps_comments_order_and_unknown_keys(guide_text):
    text = guide_text + "MY_OWN_KEY: [1, 2]   # for later\n"
    document = parse_yaml(text)
    document.set(("llm", "AutoAWQ", "Q_GROUP_SIZE"), 64)
    lines = document.dump().splitlines()
    before = text.splitlines()
    changed = [[a.split(), b.split()] for a, b in zip(before, lines, strict=True) if a.split() != b.split()]
    assert changed == [
        [f"Q_GROUP_SIZE: {size} # group size for quantization [default: 128, 64, 32]".split() for size in (128, 64)]
    ]
    assert "MY_OWN_KEY: [1, 2]   # for later" in lines
    assert parse_yaml(document.dump()).config.algorithm_settings.Q_GROUP_SIZE == 64


def test_a_new_key_stands_above_the_heading_of_the_next_part(guide_text):
    document = parse_yaml(guide_text)
    document.set(("llm", "AutoAWQ", "ENGINE"), "native")
    document.set(("llm", "Native", "OVERRIDES"), [{"PATTERN": "*.down_proj", "W_BIT": 8}])
    document.set(("llm", "Native", "DAMP"), 0.1)
    document.set(("CALIBRATION", "SAMPLES"), 4)
    text = document.dump()
    added = """\
    ENGINE: "native"
  Native:
    OVERRIDES:
    - PATTERN: "*.down_proj"
      W_BIT: 8
    DAMP: 0.1

# Job configuration
CUDA_ID: "0"
"""
    assert 'VERSION: "GEMV"                     # quantization version (GEMM or GEMV)\n' + added in text
    assert text.endswith('TASK: "llm"\nCALIBRATION:\n  SAMPLES: 4\n') and text.count("#") == guide_text.count("#")


@pytest.mark.parametrize(
    "before", ["[]  # none", "", "[{PATTERN: x, KEEP: True}]", "\n      - {PATTERN: x, KEEP: True}  # x"]
)
def test_a_list_in_the_place_of_a_value_keeps_what_follows_below(before):
    text = f"llm:\n  Native:\n    OVERRIDES: {before}\n\n# next\nA: 1\n"
    document = parse_yaml(text)
    document.set(("llm", "Native", "OVERRIDES"), [{"PATTERN": "*.down_proj", "W_BIT": 8}])
    assert document.dump().endswith("W_BIT: 8\n\n# next\nA: 1\n")
    assert parse_yaml(document.dump()).values == document.values


def test_unknown_keys_are_named_with_the_key_that_was_probably_meant():
    document = parse_yaml(demo_text(llm={"AutoAWQ": {"w_bit": 4}}, MODELL="x"))
    assert document.warnings == [
        "MODELL: unknown key, kept in the file without effect; did you mean MODEL?",
        "llm.AutoAWQ.w_bit: unknown key, kept in the file without effect; did you mean W_BIT?",
    ]


@pytest.mark.parametrize(
    ("changes", "key", "allowed"),
    [
        ({"ALGORITHM": "GPTZ"}, "ALGORITHM", "AutoAWQ"),
        ({"llm": {"AutoAWQ": {"Q_GROUP_SIZE": 100}}}, "llm.AutoAWQ.Q_GROUP_SIZE", "128, 64 or 32"),
        ({"ALGORITHM": ["AutoAWQ"]}, "ALGORITHM", "'LLMCompressor', 'AQLM' or 'TensorRTLLM'"),
        ({"llm": {"AutoAWQ": {"W_BIT": "4"}}}, "llm.AutoAWQ.W_BIT", "found '4'; allowed: 2, 3, 4 or 8"),
        ({"llm": {"AutoAWQ": {"W_BIT": True}}}, "llm.AutoAWQ.W_BIT", "allowed"),
        ({"llm": {"AutoAWQ": {"ZERO_POINT": "yes"}}}, "llm.AutoAWQ.ZERO_POINT", "True or False"),
        ({"llm": {"AutoAWQ": {"VERSION": "MARLIN"}}}, "llm.AutoAWQ.VERSION", "'GEMM' or 'GEMV'"),
        ({"JOB_ID": "../../etc"}, "JOB_ID", "letters, digits"),
        ({"JOB_ID": "a/b"}, "JOB_ID", "letters, digits"),
        ({"JOB_ID": "x" * 101}, "JOB_ID", "at most 100"),
        ({"CUDA_ID": "gpu0"}, "CUDA_ID", '"0"'),
        ({"USER_FOLDER": "/etc"}, "USER_FOLDER", "inside the home folder"),
        ({"LOGGING_PATH": "../logs"}, "LOGGING_PATH", "inside the home folder"),
        ({"TEXT_COLUMN": "a,b"}, "FORMAT_STRING", "several text columns"),
        ({"FORMAT_STRING": "{answer}"}, "FORMAT_STRING", "TEXT_COLUMN"),
        ({"FORMAT_STRING": "{text.__class__}"}, "FORMAT_STRING", "plain column name"),
        ({"DATASET_NAME": None}, "DATASET_NAME", "DATA_PATH"),
        ({"MODEL": None}, "MODEL", "required"),
        ({"CALIBRATION": {"SAMPLES": 0}}, "CALIBRATION.SAMPLES", "at least 1"),
        ({"CALIBRATION": {"SAMPLES": 1.5}}, "CALIBRATION.SAMPLES", "whole number"),
        ({"EVALUATION": {"TASKS": ["../x.yaml"]}}, "EVALUATION.TASKS.0.NAME", "letters, digits"),
        ({"EVALUATION": {"TASKS": ["arc:many"]}}, "EVALUATION.TASKS", "name:shots"),
        ({"EVALUATION": "no"}, "EVALUATION", "a section"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_and_what_is_allowed(changes, key, allowed):
    with pytest.raises(ConfigErrors) as caught:
        _ = parse_yaml(demo_text(**changes)).config
    (error,) = caught.value.errors
    assert error.key == key
    assert allowed in error.message


def test_all_problems_are_reported_together():
    text = demo_text(JOB_ID="a b", ALGORITHM="x", llm={"AutoAWQ": {"W_BIT": 5}})
    with pytest.raises(ConfigErrors) as caught:
        _ = parse_yaml(text).config
    assert {e.key for e in caught.value.errors} == {"JOB_ID", "ALGORITHM", "llm.AutoAWQ.W_BIT"}


def test_the_guides_short_form_of_tasks():
    config = parse_yaml(demo_text(EVALUATION={"TASKS": "arc_challenge:25, gsm8k:5:250"})).config
    assert [(t.NAME, t.NUM_FEWSHOT, t.LIMIT) for t in config.EVALUATION.TASKS] == [
        ("arc_challenge", 25, None),
        ("gsm8k", 5, 250),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("MODEL: [", "line 1"),
        ("A: 1\nA: 2\n", 'duplicate key "A"'),
        ("", "nothing"),
        ("- a\n- b\n", "job file"),
        ("A: !!python/name:os.system\n", "python/name"),
        ("A: !!python/object/apply:os.system ['true']\n", "apply"),
        ("A: .nan\n", "finite"),
        ("A: 1e999\n", "finite"),
        ("\x00", "not valid YAML"),
        (BILLION_LAUGHS, "more than"),
        ("A: " + "[" * 5000 + "]" * 5000, ""),
        ("A: " + "x" * 2_000_000, "bytes"),
    ],
)  # fmt: skip
def test_what_is_not_a_job_file_is_refused(text, says):
    with pytest.raises(ConfigError, match=None) as caught:
        parse_yaml(text)
    assert says in caught.value.message


def test_a_file_with_bom_and_windows_line_ends_is_read(guide_text):
    text = "\ufeff" + guide_text.replace("\n", "\r\n")
    assert parse_yaml(text).config == parse_yaml(guide_text).config


def test_a_form_makes_the_same_file_as_a_person_would():
    document = new_document({"MODEL": "quantdeck/demo", "llm": {"AutoAWQ": {"ZERO_POINT": True}}, "DATA_PATH": None})
    assert document.dump() == 'MODEL: "quantdeck/demo"\nllm:\n  AutoAWQ:\n    ZERO_POINT: True\nDATA_PATH:\n'
