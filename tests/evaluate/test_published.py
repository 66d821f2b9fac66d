"""The published figures: those of the guides, whole, and told apart from measured ones wherever they are shown."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest

from backend.cli import main
from backend.evaluate.published import CAPTION, TABLES, to_csv, to_markdown

SURVEY = {
    ("TensorRT-LLM", "AWQ"): (3.42, 5.69, 194.86, 6.02),
    ("TensorRT-LLM", "INT8"): (6.53, 8.55, 143.57, 5.89),
    ("TensorRT-LLM", "FP16"): (12.55, 14.61, 83.43, 5.85),
    ("TGI", "AWQ"): (3.62, 36.67, 106.84, 6.02),
    ("TGI", "FP16"): (12.55, 38.03, 74.19, 5.85),
}


def test_the_survey_is_whole() -> None:
    table = TABLES[0]
    assert {(row.runtime, re.split("[ ,]", row.label)[0]): row.values for row in table.rows} == SURVEY
    assert [column.unit for column in table.columns] == ["GB", "GB", "tokens/s", ""]
    assert [column.higher_is_better for column in table.columns] == [False, False, True, False]


def test_every_table_says_whose_figures_they_are_and_fills_its_columns() -> None:
    for table in TABLES:
        assert table.model and table.hardware and table.source, table.heading
        assert all(len(row.values) == len(table.columns) for row in table.rows), table.heading


def test_the_three_forms_carry_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--published", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    lines = list(csv.DictReader(io.StringIO(to_csv())))
    numbers = [value for table in found for row in table["rows"] for value in row["values"] if value is not None]
    assert [float(line["published"]) for line in lines] == numbers
    assert all(f"| {value:g} |" in to_markdown() for value in numbers)
    assert main(["compare", "--published"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(CAPTION) and "arXiv 2402.01799" in text and "Hardware: not stated" in text


def test_published_figures_and_jobs_are_asked_for_apart(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, found in ((["--published", "a-job"], "both were given"), ([], "neither was given")):
        assert main(["compare", *arguments]) == 2
        assert found in capsys.readouterr().err
