"""The reference of the job file: current, whole, and helpful for one key."""

from __future__ import annotations

import json

import pytest

from backend.cli import main
from backend.errors import ConfigError
from backend.paths import PROJECT
from backend.schema import JobConfig, describe, reference, sections


def test_the_page_is_current() -> None:
    shown = (PROJECT / "docs" / "yaml.md").read_text(encoding="utf-8")
    assert shown == reference.markdown(), f"docs/yaml.md is not current: run `{reference.COMMAND}`"


def test_every_setting_is_told_once_in_its_section() -> None:
    parts = reference.markdown().split("\n## ")
    told = {part.split("\n")[0].strip("`"): part for part in parts[1:]}
    for path, model in sections(JobConfig):
        rows = describe(model)
        for spec in rows:
            part = told[".".join(path) or "Top level"]
            (row,) = [line for line in part.splitlines() if line.startswith(f"| `{spec.key}` |")]
            assert len(row.replace("\\|", "").split("|")) == 6, row
            assert ("kept, not read" in row) == spec.ignored
            assert ("**required.**" in row) == spec.required
            if spec.unit:
                assert spec.unit.replace("_", "\\_") in row
            for choice in spec.choices:
                assert str(choice).replace("_", "\\_") in row


def test_help_of_one_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "AutoAWQ.w_bit"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("llm.AutoAWQ.W_BIT: Weight bits\n")
    assert "2, 3, 4 or 8, or a list of several (bits)" in told
    assert "default: 4" in told
    assert main(["schema", "--json", "W_BIT"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["path"] for row in rows} == {s.key for s in reference.settings() if s.path[-1] == "W_BIT"}


def test_a_key_that_is_nearly_right_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"llm\.AutoAWQ\.Q_GROUP_SIZE"):
        reference.find("Q_GROUPSIZE")
    assert main(["schema", "W_BITS"]) == 2
    assert "llm.AutoAWQ.W_BIT" in capsys.readouterr().err
    assert main(["schema", "qqqq"]) == 2
    assert "lists all" in capsys.readouterr().err
