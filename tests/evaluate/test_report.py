"""Rows and table: right numbers, right signs, and no mixing of protocols."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest

from backend.evaluate.metrics import Metric, ProtocolError
from backend.evaluate.report import build_rows, format_table
from backend.evaluate.stats import corpus_perplexity
from backend.formats.bits import StoredBits
from backend.paths import PROJECT


def perplexity(nll: list[float], **protocol: Any) -> Metric:
    return Metric(
        metric="perplexity",
        name="Perplexity (wikitext, gptq, corpus)",
        value=corpus_perplexity(nll),
        stderr=None,
        unit="",
        higher_is_better=False,
        protocol={"name": "gptq_wikitext", "statistic": "corpus", "window": 512, "summary": "gptq_wikitext"} | protocol,
        samples=nll,
    )


def accuracy(scores: list[float]) -> Metric:
    return Metric(
        metric="accuracy",
        name="arc_challenge (25 shot), acc_norm",
        value=100 * sum(scores) / len(scores),
        stderr=1.0,
        unit="%",
        higher_is_better=True,
        protocol={"name": "lm_eval", "summary": "lm_eval arc_challenge"},
        samples=scores,
    )


def speed(values: list[float]) -> Metric:
    return Metric(
        metric="tokens/s",
        name="Decode (64 tokens)",
        value=sorted(values)[len(values) // 2],
        stderr=None,
        unit="tokens/s",
        higher_is_better=True,
        protocol={"name": "speed", "summary": "batch 1"},
        samples=values,
    )


BASE = {"metrics": [accuracy([1.0] * 60 + [0.0] * 40), perplexity([math.log(7.32)] * 9)]}
QUANT = {"metrics": [accuracy([1.0] * 59 + [0.0] * 41), perplexity([math.log(7.69)] * 9)]}
SPEED = {"baseline": {"metrics": [speed([9.0, 10.0, 11.0])]}, "quantized": {"metrics": [speed([30.0, 31.0, 32.0])]}}


def test_rows_have_the_fixed_keys_and_signed_impacts() -> None:
    rows = build_rows(BASE, QUANT, baseline_bytes=15_000_000_000, quantized_bytes=5_400_000_000, speed=SPEED)
    assert [row["metric"] for row in rows] == ["perplexity", "accuracy", "size", "tokens/s"]
    keys = {"metric", "name", "unit", "protocol", "baseline", "quantized", "impact", "interval", "higher_is_better"}
    assert all(keys <= set(row) for row in rows)
    ppl, acc, size, decode = rows
    assert (ppl["baseline"], ppl["quantized"], ppl["impact"]) == pytest.approx((7.32, 7.69, 0.37))
    assert (acc["baseline"], acc["impact"], acc["unit"]) == (60.0, pytest.approx(-1.0), "%")
    assert acc["interval"][0] < -1.0 < acc["interval"][1] < 5  # percentage points
    assert (size["unit"], size["baseline"], size["quantized"]) == ("GB", pytest.approx(15.0), pytest.approx(5.4))
    assert (decode["impact"], decode["interval"]) == (21.0, [21.0, 21.0])
    assert "9 paired windows" in ppl["interval_method"]


def test_table_has_the_guides_form() -> None:
    rows = build_rows(BASE, QUANT, baseline_bytes=15_000_000_000, quantized_bytes=5_400_000_000)
    lines = format_table(rows, "Llama3.1-8b").splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["Model", "Task", "Metric", "Baseline", "Quantized", "Impact"]
    assert cells[2][2:] == ["Perplexity ↓", "7.32", "7.69", "+0.37"]
    assert cells[3][2:] == ["Accuracy ↑", "60.00", "59.00", "-1.00"]
    assert cells[4][1:] == ["Size (in GB)", "Model Size ↓", "15.00", "5.40", "-9.60"]


def test_small_impacts_are_not_rounded_away() -> None:
    rows = build_rows({"metrics": [perplexity([1.0] * 9)]}, {"metrics": [perplexity([1.0003] * 9)]})
    assert "+0.0008" in format_table(rows, "tiny")


def test_small_models_are_shown_in_megabytes() -> None:
    (row,) = build_rows({"metrics": []}, {"metrics": []}, baseline_bytes=25_300_000, quantized_bytes=7_100_000)
    assert (row["unit"], row["baseline"], row["quantized"]) == ("MB", pytest.approx(25.3), pytest.approx(7.1))


def test_bits_are_those_of_the_quantized_linears_and_of_all_where_some_were_not() -> None:
    def rows(quantized: StoredBits) -> list[tuple[str, float, float]]:
        found = build_rows({"metrics": []}, {"metrics": []}, bits=(StoredBits(None, 16.0, 100, 100), quantized))
        assert all((row["metric"], row["unit"], row["interval"]) == ("bits per weight", "bits", None) for row in found)
        return [(row["name"], row["baseline"], row["quantized"]) for row in found]

    only, every = "Stored bits, quantized Linears", "Stored bits, all Linears of the layers"
    assert rows(StoredBits(2.25, 2.25, 100, 0)) == [(only, 16.0, 2.25)]
    assert rows(StoredBits(2.25, 3.6, 100, 10)) == [(only, 16.0, 2.25), (every, 16.0, 3.6)]
    assert rows(StoredBits(None, 16.0, 100, 100)) == [(every, 16.0, 16.0)]


def test_different_protocols_never_share_a_row() -> None:
    other = {"metrics": [QUANT["metrics"][0], perplexity([2.0] * 9, window=2048)]}
    with pytest.raises(ProtocolError, match="window: 512, 2048"):
        build_rows(BASE, other)


def test_protocol_id_tells_protocols_apart() -> None:
    def identity(**protocol: Any) -> str:
        result = {"metrics": [perplexity([2.0] * 9, **protocol)]}
        return str(build_rows(result, result)[0]["protocol_id"])

    assert identity() == identity(summary="said differently")
    assert identity() != identity(text_sha256="other text")


def test_a_metric_of_one_model_only_is_refused() -> None:
    with pytest.raises(ProtocolError, match="arc_challenge"):
        build_rows(BASE, {"metrics": [QUANT["metrics"][1]]})


def test_reused_baseline_is_dated_but_speed_is_not() -> None:
    cached = BASE | {"cached": True, "cached_at": "2026-01-02T03:04:05+00:00"}
    dates = {row["metric"]: row["cached_at"] for row in build_rows(cached, QUANT, speed=SPEED)}
    assert dates == {
        "perplexity": "2026-01-02T03:04:05+00:00",
        "accuracy": "2026-01-02T03:04:05+00:00",
        "tokens/s": None,
    }


def test_what_pages_import_does_not_import_torch() -> None:
    modules = "report, cache, tasks, speed, fidelity, worker"
    code = (
        f"import sys; from backend.evaluate import {modules}; import backend.chat.client, backend.chat.side_by_side; "
        "sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0
