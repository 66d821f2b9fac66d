"""Several configurations in one table: the baseline once, every impact against the configuration's own baseline."""

from __future__ import annotations

from typing import Any

from backend.evaluate.combined import combine, combined_table, short_name
from backend.evaluate.compare import comparison_rows, to_csv, to_markdown


def row(metric: str, name: str, before: float, after: float, **more: Any) -> dict[str, Any]:
    return {
        "metric": metric, "name": name, "unit": "", "protocol": name, "protocol_id": name, "baseline": before,
        "quantized": after, "impact": after - before, "interval": None, "interval_method": None,
        "higher_is_better": False, "cached_at": None, **more,
    }  # fmt: skip


def entry(name: str, *rows: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "label": name.upper(), "rows": list(rows)}


W4 = entry(
    "w4",
    row("perplexity", "Perplexity (wikitext:test, gptq)", 7.32, 7.323),
    row("accuracy", "arc", 60.0, 59.0, unit="%", higher_is_better=True),
    row("size", "Size", 15.0, 5.4, unit="GB"),
    row("tokens/s", "Prefill (128 tokens)", 900.0, 800.0, unit="tokens/s", higher_is_better=True),
    row("tokens/s", "Decode (64 tokens)", 10.0, 31.0, unit="tokens/s", higher_is_better=True),
    row("peak memory", "Peak memory, running", 16.0, 6.0, unit="GB"),
)
W3 = entry(
    "w3", row("perplexity", "Perplexity (wikitext:test, gptq)", 7.32, 9.0), row("size", "Size", 15.0, 4.2, unit="GB")
)


def test_each_number_has_a_column_and_each_configuration_a_line() -> None:
    columns, lines = combine([W4, W3])
    assert [c.heading for c in columns] == ["Size (GB) ↓", "Perplexity, gptq ↓", "arc (%) ↑", "Decode (tokens/s) ↑"]
    base, w4, w3 = lines
    assert [c.value for c in base.cells if c] == ["15.00", "7.3200", "60.00", "10.0"]
    assert [(c.value, c.impact) for c in w4.cells if c] == [
        ("5.40", "-64 %"), ("7.3230", "+0.0030"), ("59.00", "-1.00"), ("31.0", "+210 %"),
    ]  # fmt: skip
    assert w3.cells[2:] == (None, None) and w3.cells[1] is not None and w3.cells[1].impact == "+1.6800"


def test_the_text_table_is_aligned() -> None:
    lines = combined_table([W4, W3]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[4].split("|")[-2].strip() == "-"


def test_numbers_of_different_protocols_get_columns_of_their_own() -> None:
    other = entry("w2", row("perplexity", "Perplexity (wikitext:test, gptq)", 7.32, 8.0, protocol_id="other"))
    columns, lines = combine([W4, other])
    assert [c.heading for c in columns].count("Perplexity, gptq ↓") == 2
    assert [cell is None for cell in lines[2].cells] == [True, True, False, True, True]


def test_names_are_shortened_only_where_the_text_is_shared() -> None:
    assert short_name(row("perplexity", "Perplexity (a/b:test, gptq, corpus)", 1, 1)) == "Perplexity, gptq, corpus"
    assert short_name(row("accuracy", "arc (25 shot), acc", 1, 1)) == "arc (25 shot), acc"


class Finished:
    job_id, model, algorithm, state = "job", "a/model", "Native", "succeeded"

    def __init__(self, *entries: dict[str, Any]) -> None:
        self.result = {"results": list(entries)}


def test_configurations_of_one_job_are_compared_by_name() -> None:
    rows = comparison_rows([Finished(W4, W3)])
    assert [(r["configuration"], r["metric"]) for r in rows[:3]] == [
        ("w4", "perplexity"), ("w3", "perplexity"), ("w4", "accuracy"),
    ]  # fmt: skip
    assert "| job / w3 | Perplexity" in to_markdown(rows)
    assert "| job | Perplexity" in to_markdown(comparison_rows([Finished(W4)]))
    assert to_csv(rows).splitlines()[0].startswith("job,model,algorithm,configuration,metric")
