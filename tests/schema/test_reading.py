"""Files as people have them: in JSON, with odd spelling, with mistakes; told with lines, changed line by line."""

from __future__ import annotations

import json

import pytest

from backend.cli import main
from backend.errors import ConfigError, ConfigErrors
from backend.schema import parse_file, parse_yaml, read_yaml
from backend.schema.errors import UnreadableFile
from backend.schema.report import report, with_lines
from tests.conftest import EXAMPLES, demo_text

GUIDES = sorted(EXAMPLES.glob("*.yaml"))
ODD = """\
# mine

MODEL:   "quantdeck/demo"    
DATASET_NAME: 'quantdeck/demo'
ALGORITHM: "Native"
MY_LIST:
    - 1
    -   two
llm:
    Native:
        # bits
        W_BIT:   [4,3]   # both
        KEEP:
            - lm_head
FORMAT_STRING: >-
    {text}
    again
CACHE_PATH: ~
JOB_ID: "odd"
PRIORITY: 0x10

# end
"""  # noqa: W291  blanks at a line's end are the point
WRONG = """\
MODEL: quantdeck/demo
DATASET_NAME: quantdeck/demo
ALGORITHM: AutoAWQ
MODLE: x
JOB_ID: "a b"
JOB_PATH: somewhere
llm:
  AutoAWQ:
    Q_GROUP_SIZE: 100
    ZERO_POINT: true
    W_BITS: 4
  AQLM:
    overwrite: true
EVALUATION:
  TASKS:
    - arc_easy:5
    - ../x
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_one_change_changes_one_line(path, start, ends):
    text = start + path.read_text(encoding="utf-8").replace("\n", ends)
    document = parse_yaml(text)
    assert document.dump() == text
    document.set(("SPLIT",), "other")
    before, after = text.split("\n"), document.dump().split("\n")
    changed = [(one, other) for one, other in zip(before, after, strict=True) if one != other]
    assert [other for _, other in changed] == ['SPLIT: "other"' + ends[:-1]] and changed[0][0].startswith("SPLIT:")
    assert parse_yaml(document.dump()).values == document.values


def test_odd_spelling_stays_around_a_change():
    document = parse_yaml(ODD)
    document.set(("JOB_ID",), "even")
    assert document.dump() == ODD.replace('"odd"', '"even"')
    document.set(("llm", "Native", "W_BIT"), 4)
    document.remove(("MY_LIST",))
    document.set(("llm", "Native", "DAMP"), 0.5)
    text = document.dump()
    assert parse_yaml(text).values == document.values and "MY_LIST" not in text
    for kept in (
        'MODEL:   "quantdeck/demo"    \n',
        "CACHE_PATH: ~\n",
        "PRIORITY: 0x10\n\n# end\n",
        "# bits\n",
        "    again",
    ):
        assert kept in text, kept


def test_a_change_that_is_taken_back_gives_the_file_back():
    document = parse_yaml(ODD)
    document.set(("JOB_ID",), "even")
    document.set(("JOB_ID",), "odd")
    assert document.dump() == ODD


def test_a_file_that_is_all_odd_lines_is_changed_soon():
    lines = "".join(f"k{number}:    {number}\n#   {number % 2}\n" for number in range(2400))
    document = parse_yaml(lines + "JOB_ID: x\n")
    document.set(("JOB_ID",), "y")
    assert parse_yaml(document.dump()).values == document.values


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
@pytest.mark.parametrize("indent", [None, 2, "\t"], ids=["one line", "spaces", "tabs"])
def test_a_guide_in_json_is_the_same_job_and_written_as_yaml(path, indent):
    values = parse_yaml(path.read_text(encoding="utf-8")).values
    document = parse_file(json.dumps(values, indent=indent))
    assert document.values == values and document.config
    text = document.dump()
    assert text.startswith('MODEL: "') and parse_yaml(text).values == values


def test_nothing_of_a_json_file_is_lost():
    values = {"MODEL": "x", "e": {}, "n": {"l": [], "m": [{"a": 1, "b": {}}]}, "é": "\U0001f600 \n end", "f": 1e-7,
              "big": 10**20, "none": None, "yes": "yes", "on": True}  # fmt: skip
    document = parse_file("\ufeff" + json.dumps(values))
    assert document.values == values
    assert parse_yaml(document.dump()).values == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"A": 1,, "B": 2}', "line 1, column 9"),
        ('{"A": 1,\n "B" 2}', "line 2, column 6: Expecting ':' delimiter; the line is: \"B\" 2}"),
        ('{"A": 1, "A": 2}', "found the key A twice"),
        ('{"A": NaN}', "finite"),
        ('{"A": 1e999}', "finite"),
        ('{"A": "\\ud800"}', "half a character"),
        ('{"A": ' + "[" * 30 + "]" * 30 + "}", "deeper than 20"),
        ('{"A": ' + "[" * 90_000 + "]" * 90_000 + "}", ""),
        ('{"A": [' + "1," * 6000 + "1]}", "more than 5000 values"),
        ('{"A": ' + "1" * 5000 + "}", "not valid JSON"),
        ('{"A": 1} x', "not valid JSON"),
    ],
    ids=range(11),
)
def test_what_is_no_job_file_in_json_is_refused(text, says):
    with pytest.raises(ConfigError) as caught:
        parse_file(text)
    assert says in caught.value.message


def test_yaml_with_braces_is_yaml():
    assert parse_file("{MODEL: x, # note\n A: 'y'}").values == {"MODEL": "x", "A": "y"}


def test_a_syntax_error_tells_the_line_and_shows_it():
    with pytest.raises(UnreadableFile) as caught:
        parse_yaml('MODEL: x\nW_BIT: 4: 5   # "quoted"\nB: 1\n')
    found = caught.value
    assert (found.line, found.column, found.caret) == (2, 9, 9) and found.shown == 'W_BIT: 4: 5   # "quoted"'
    assert found.message.startswith("this is not valid YAML: line 2, column 9: mapping values are not allowed")
    with pytest.raises(UnreadableFile) as caught:
        parse_yaml("A: 1\nB: [1,\nC: 2\n")
    assert (caught.value.line, caught.value.shown) == (2, "B: [1,") and "from line 2 on" in caught.value.message
    with pytest.raises(UnreadableFile) as caught:
        parse_yaml("A: " + "x" * 500 + ": " + "y" * 500 + "\n")
    assert len(caught.value.shown) == 160 and 0 < caught.value.caret <= 160


def test_the_report_of_a_file_with_all_kinds_of_mistakes():
    found = report(parse_yaml(WRONG))
    assert found.understood == {"Model": 1, "Dataset": 1, "Algorithm": 1, "AutoAWQ": 1, "Evaluation": 1}
    assert [(one.line, one.key) for one in found.wrong] == [
        (5, "JOB_ID"), (9, "llm.AutoAWQ.Q_GROUP_SIZE"), (17, "EVALUATION.TASKS.1.NAME"),
    ]  # fmt: skip
    assert "found 100; allowed: 128, 64 or 32" in found.wrong[1].text
    assert [(one.line, one.key, one.text) for one in found.unknown] == [
        (4, "MODLE", "did you mean MODEL?"), (11, "llm.AutoAWQ.W_BITS", "did you mean W_BIT?"),
    ]  # fmt: skip
    assert [(one.line, one.key) for one in found.unread] == [(6, "JOB_PATH"), (12, "llm.AQLM")]
    assert "ALGORITHM is AutoAWQ" in found.unread[1].text


def test_the_report_tells_what_a_file_may_not_ask_for():
    text = demo_text(ALGORITHM="AQLM", llm={"AQLM": {"calibration_config": {"on_save": "import os", "no_quant": True}}})
    (one,) = report(parse_yaml(text)).wrong
    assert one.key == "llm.AQLM.calibration_config.on_save" and "runs no code" in one.text
    assert text.split("\n")[one.line - 1].strip().startswith("on_save:")
    (one,) = report(parse_yaml("MODEL: x\nHF_ENDPOINT: http://x\n")).wrong
    assert (one.key, one.line) == ("HF_ENDPOINT", 2) and "cannot set environment" in one.text


@pytest.mark.parametrize("path", GUIDES, ids=lambda p: p.stem)
def test_the_report_of_a_guide_has_nothing_wrong_or_unknown(path):
    document = parse_yaml(path.read_text(encoding="utf-8"))
    found = report(document)
    assert not found.wrong and not found.unknown and sum(found.understood.values()) >= 8
    lines = document.dump().split("\n")
    for one in found.unread:
        assert lines[one.line - 1].strip().startswith(one.key.rpartition(".")[2] + ":")


def test_lines_of_a_json_file_are_those_of_the_json():
    document = parse_file('{\n\t"MODEL": "x",\n\t"llm": {"AutoAWQ": {\n\t\t"W_BIT": 9}},\n\t"ALGORITHM": "AutoAWQ"}')
    with pytest.raises(ConfigErrors) as caught:
        _ = document.config
    lines = {one.key: one.line for one in with_lines(document, caught.value).errors}
    assert lines["llm.AutoAWQ.W_BIT"] == 4 and lines["JOB_ID"] == 0


def test_the_command_line_tells_lines(tmp_path, capsys):
    file = tmp_path / "wrong.yaml"
    file.write_text(WRONG)
    assert main(["validate", str(file), "--home", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "warning: line 4: MODLE: unknown key, kept in the file without effect; did you mean MODEL?\n" in told
    assert "error: line 9: llm.AutoAWQ.Q_GROUP_SIZE: found 100; allowed: 128, 64 or 32" in told
    assert "\nline 5: JOB_ID: found 'a b'" in told
    file.write_text(demo_text(SPLIT="nowhere"))
    assert main(["validate", str(file), "--home", str(tmp_path)]) == 2
    assert "line 4: SPLIT: found 'nowhere'; quantdeck/demo has train, validation, test" in capsys.readouterr().err


def test_a_job_file_in_json_is_validated_too(tmp_path, capsys):
    file = tmp_path / "job.json"
    file.write_text(json.dumps(parse_yaml(demo_text("from-json")).values, indent="\t"))
    assert read_yaml(str(file)).config.JOB_ID == "from-json"
    assert main(["validate", str(file), "--home", str(tmp_path)]) == 0
    assert "valid (AutoAWQ of quantdeck/demo" in capsys.readouterr().out
