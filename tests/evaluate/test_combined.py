"""Several configurations in one table: the baseline once, every impact against the configuration's own baseline."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from backend.evaluate.combined import combine, combined_table, short_name
from backend.evaluate.compare import comparison_rows, to_csv, to_json, to_markdown


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


def distance(name: str, kl: float, half: float | None, flips: float, bits: float) -> dict[str, Any]:
    interval = None if half is None else [kl - half, kl + half]
    return entry(
        name,
        row("KL divergence", "KL(base ‖ quantized), a:test", 0.0, kl, unit="nats/token", interval=interval),
        row("top-1 flips", "Top-1 flips, a:test", 0.0, flips, unit="%"),
        row("bits per weight", "Stored bits, quantized Linears", 16.0, bits, unit="bits"),
    )


def test_distances_stand_beside_half_their_interval_and_each_with_its_own_digits() -> None:
    results = [distance("w8", 5.86e-05, 4e-06, 0.6, 8.19), distance("w2", 0.0276, 0.0023, 7.24, 2.14)]
    results.append(distance("same", 0.0, None, 0.0, 16.0))
    columns, (base, w8, w2, same) = combine(results)
    headings = ["Bits per weight ↓", "KL divergence (nats/token) ↓", "Top-1 flips (%) ↓"]
    assert [c.heading for c in columns] == headings
    assert [c.value for c in base.cells if c] == ["16.00", "0", "0"]
    assert [(c.value, c.impact) for c in w8.cells if c] == [
        ("8.19", "-7.81"), ("0.0000586", "±0.0000040"), ("0.60", ""),
    ]  # fmt: skip
    assert [c.value for c in w2.cells if c] == ["2.14", "0.0276", "7.24"]
    assert [c.value for c in same.cells if c] == ["16.00", "0", "0"]
    assert len({line.count("|") for line in combined_table(results).splitlines()}) == 1


def test_bits_of_the_quantized_and_of_all_linears_are_told_apart() -> None:
    bits = row("bits per weight", "Stored bits, all Linears of the layers", 16.0, 4.0, unit="bits")
    columns, _ = combine([entry("w2", *distance("w2", 0.1, None, 1.0, 2.1)["rows"], bits)])
    assert [c.heading for c in columns][:2] == ["Bits per weight ↓", "Bits per weight, all Linears of the layers ↓"]


def test_jobs_are_compared_by_distance_and_bits_too() -> None:
    rows = comparison_rows([Finished(distance("w4", 0.000712, 3e-05, 1.9, 4.16))])
    assert [r["metric"] for r in rows] == ["KL divergence", "top-1 flips", "bits per weight"]
    told = to_markdown(rows).splitlines()
    assert "| 0 | 0.000712 | +0.000712 [+0.000682, +0.000742] |" in told[2]
    assert len({line.count("|") for line in told}) == 1
    written = next(csv.DictReader(io.StringIO(to_csv(rows))))
    assert (written["metric"], written["unit"], written["baseline"]) == ("KL divergence", "nats/token", "0.0")
    assert float(written["interval_low"]) == pytest.approx(0.000682)
    assert json.loads(to_json(rows))[0]["quantized"] == 0.000712


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
