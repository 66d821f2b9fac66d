"""Baseline against quantized, as rows and as the guides' table.

A row compares two numbers of one protocol; anything else is refused. `interval` is the 95 % interval of the
impact, from paired data, and `interval_method` says how it was computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from backend.disk import BYTE_UNITS
from backend.evaluate.metrics import Metric, ProtocolError, differences, protocol_id

if TYPE_CHECKING:
    from backend.evaluate.stats import Interval
    from backend.formats.bits import StoredBits

Row = dict[str, Any]
Result = Mapping[str, Any]

ORDER = (
    "perplexity", "accuracy", "KL divergence", "top-1 flips", "size", "bits per weight", "tokens/s", "peak memory",
)  # fmt: skip
TITLES = {
    "perplexity": "Perplexity",
    "accuracy": "Accuracy",
    "KL divergence": "KL Divergence",
    "top-1 flips": "Top-1 Flips",
    "size": "Model Size",
    "bits per weight": "Bits per Weight",
    "tokens/s": "Throughput",
    "peak memory": "Peak Memory",
}
DISTANCES = ("KL divergence", "top-1 flips")
"""Numbers that compare the quantized model with its base model; the base model's own is 0 by definition."""


def size_metric(weight_bytes: int) -> Metric:
    """The size of a model's weight files as a metric, in bytes."""
    return Metric(
        metric="size",
        name="Size",
        value=float(weight_bytes),
        stderr=None,
        unit="bytes",
        higher_is_better=False,
        protocol={"name": "size", "summary": "*.safetensors on disk; 1 GB = 10^9 bytes"},
        samples=[],
    )


def bits_metrics(baseline: StoredBits, quantized: StoredBits) -> list[tuple[Metric, Metric]]:
    """Both models' bits per weight: of the Linears that were quantized, and of all of them where some were not."""
    pairs = []
    if quantized.quantized is not None:
        pairs.append(("quantized Linears", baseline.linears, quantized.quantized))
    if quantized.kept:
        pairs.append(("all Linears of the layers", baseline.linears, quantized.linears))
    return [(_bits_metric(which, before), _bits_metric(which, after)) for which, before, after in pairs]


def _bits_metric(which: str, bits: float) -> Metric:
    return Metric(
        metric="bits per weight",
        name=f"Stored bits, {which}",
        value=bits,
        stderr=None,
        unit="bits",
        higher_is_better=False,
        protocol={
            "name": "bits",
            "linears": which,
            "summary": "codes, scales, zeros and codebooks on disk, per weight",
        },
        samples=[],
    )


def build_rows(
    baseline: Result,
    quantized: Result,
    *,
    baseline_bytes: int | None = None,
    quantized_bytes: int | None = None,
    bits: tuple[StoredBits, StoredBits] | None = None,
    fidelity: Result | None = None,
    speed: Result | None = None,
) -> list[Row]:
    """Put two models' results side by side.

    Args:
        baseline: RESULT of the worker for the baseline.
        quantized: RESULT of the worker for the quantized model, under the same request.
        baseline_bytes: Bytes of the baseline's weight files; with `quantized_bytes` adds the size row.
        quantized_bytes: Bytes of the quantized model's weight files.
        bits: What the Linears of both models take on disk.
        fidelity: RESULT of the comparison of both models' outputs.
        speed: RESULT of the speed benchmark.

    Returns:
        Rows `{"metric", "name", "unit", "protocol", "baseline", "quantized", "impact", "interval",
        "higher_is_better", "protocol_id", "interval_method", "cached_at"}`; impact is quantized minus baseline in
        `unit`, interval `[low, high]` or None, `cached_at` the date of a reused baseline or None.

    Raises:
        ProtocolError: If a metric is on one side only, or measured under different protocols.
    """
    left: list[Metric] = list(baseline["metrics"])
    right: list[Metric] = list(quantized["metrics"])
    if baseline_bytes is not None and quantized_bytes is not None:
        left.append(size_metric(baseline_bytes))
        right.append(size_metric(quantized_bytes))
    for before, after in bits_metrics(*bits) if bits else ():
        left.append(before)
        right.append(after)
    reused = {id(metric) for metric in baseline["metrics"]} if baseline.get("cached") else set()
    for pair in (fidelity, speed):
        if pair is not None:
            left += pair["baseline"]["metrics"]
            right += pair["quantized"]["metrics"]
    pairs = _pair(left, right)
    rows = [_row(a, b, baseline.get("cached_at") if id(a) in reused else None) for a, b in pairs]
    return sorted(rows, key=lambda row: ORDER.index(row["metric"]) if row["metric"] in ORDER else len(ORDER))


def format_table(rows: Iterable[Row], model_name: str) -> str:
    """The guides' table: Model | Task | Metric | Baseline | Quantized | Impact, as aligned Markdown."""
    head = ["Model", "Task", "Metric", "Baseline", "Quantized", "Impact"]
    body = [
        [model_name, task_label(row), f"{title(row)} {'↑' if row['higher_is_better'] else '↓'}", *format_values(row)]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *body]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def title(row: Row) -> str:
    """What kind of number a row holds, in the guides' words."""
    return TITLES.get(row["metric"], str(row["metric"]))


def task_label(row: Row) -> str:
    """A row's name with its unit where the guides show one, e.g. `Size (in GB)`."""
    return f"{row['name']} (in {row['unit']})" if row["metric"] in ("size", "peak memory") else str(row["name"])


def format_values(row: Row) -> tuple[str, str, str]:
    """Baseline, quantized and signed impact with as many decimals as make the impact visible."""
    return (
        format_value(row, row["baseline"]),
        format_value(row, row["quantized"]),
        f"{row['impact']:+.{decimals(row)}f}",
    )


def format_value(row: Row, value: float, places: int | None = None) -> str:
    """A value with a row's decimals (or so many); a distance of nothing is a plain 0."""
    if row["metric"] in DISTANCES and not value:
        return "0"
    return f"{value:.{decimals(row) if places is None else places}f}"


def decimals(row: Row) -> int:
    """How many decimals make a row's impact visible; of a divergence, three digits that count."""
    if row["metric"] == "KL divergence":
        return min(8, max(2, 2 - math.floor(math.log10(row["impact"])))) if row["impact"] else 2
    places = 1 if row["metric"] == "tokens/s" else 2
    while places < 5 and row["impact"] and abs(row["impact"]) < 5 * 10.0**-places:
        places += 1
    return places


def _pair(left: Sequence[Metric], right: Sequence[Metric]) -> list[tuple[Metric, Metric]]:
    a = {(metric["metric"], metric["name"]): metric for metric in left}
    b = {(metric["metric"], metric["name"]): metric for metric in right}
    alone = sorted(name for _, name in a.keys() ^ b.keys())
    if alone:
        raise ProtocolError(
            f"Measured for one model only: {', '.join(alone)}. Measure baseline and quantized model by one request."
        )
    for key, metric in a.items():
        found = differences(metric["protocol"], b[key]["protocol"])
        if found:
            raise ProtocolError(
                f"{key[1]} was measured under different protocols (baseline, quantized): {'; '.join(found)}. "
                "Such numbers are not comparable; measure both again under one protocol."
            )
    return [(metric, b[key]) for key, metric in a.items()]


def _row(baseline: Metric, quantized: Metric, cached_at: str | None) -> Row:
    interval, method = _interval(baseline, quantized)
    unit, scale = baseline["unit"], 1.0
    if unit == "bytes":
        largest = max(baseline["value"], quantized["value"])
        unit = next((u for u, size in BYTE_UNITS.items() if largest >= size), "bytes")
        scale = 1.0 / BYTE_UNITS[unit]
    elif unit == "%":
        interval = (100 * interval[0], 100 * interval[1]) if interval else None  # samples are fractions
    return {
        "metric": baseline["metric"],
        "name": baseline["name"],
        "unit": unit,
        "protocol": baseline["protocol"]["summary"],
        "protocol_id": protocol_id(baseline["protocol"]),
        "baseline": baseline["value"] * scale,
        "quantized": quantized["value"] * scale,
        "impact": (quantized["value"] - baseline["value"]) * scale,
        "interval": list(interval) if interval else None,
        "interval_method": method if interval else None,
        "higher_is_better": baseline["higher_is_better"],
        "cached_at": cached_at,
    }


def _interval(baseline: Metric, quantized: Metric) -> tuple[Interval | None, str]:
    """95 % interval of quantized minus baseline, and its method."""
    # Here, since it imports numpy: a runner, which needs this once at its end, would start 0.07 s later.
    from backend.evaluate.stats import (
        accuracy_interval,
        distance_interval,
        median_difference_interval,
        perplexity_interval,
    )

    a, b = baseline["samples"], quantized["samples"]
    if not a or len(a) != len(b):
        return None, ""
    if baseline["metric"] == "perplexity":
        running = baseline["protocol"]["statistic"] != "corpus"
        return perplexity_interval(a, b, running=running), f"delta method over {len(a)} paired windows"
    if baseline["metric"] in DISTANCES:
        return distance_interval(a, b), f"Student's t over {len(a)} windows"
    if baseline["metric"] == "tokens/s":
        return median_difference_interval(a, b), f"bootstrap of the medians of {len(a)} paired repetitions"
    return accuracy_interval(a, b), f"{len(a)} paired questions (Bonett and Price 2012 for right/wrong scores)"
