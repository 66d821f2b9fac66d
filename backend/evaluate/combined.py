"""Several configurations of one model in one table: a line each, the baseline first, with impacts beside the values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.evaluate.report import DISTANCES, Row, decimals, format_value

_PERPLEXITY = re.compile(r"Perplexity \([^,]*, (.+)\)$")
_METRICS = ("size", "bits per weight", "KL divergence", "top-1 flips", "perplexity", "accuracy", "tokens/s")
_BITS = "Stored bits, "


@dataclass(frozen=True)
class Column:
    """One number of every configuration, under one protocol.

    Attributes:
        heading: Name with unit and the direction of improvement.
        protocol: How it is measured.
        name: The rows' name.
        metric: The rows' kind of number.
    """

    heading: str
    protocol: str
    name: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """A value; of a configuration also the row that it comes from, and its signed impact.

    A distance from the baseline is its own impact: beside it stands half of its 95 % interval.
    """

    value: str
    impact: str = ""
    row: Row | None = None


@dataclass(frozen=True)
class Line:
    """One configuration (or the baseline, with an empty name); None where a number was not measured."""

    name: str
    label: str
    cells: tuple[Cell | None, ...]


def combine(results: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[Line]]:
    """Put the results of a job's configurations side by side.

    The baseline's speed is measured anew beside every configuration; its line shows the first of these numbers, and
    every impact refers to the configuration's own.

    Args:
        results: Entries with `name`, `label` and `rows`, as in `Job.result`.
    """
    found: dict[tuple[str, str, str], list[Row]] = {}
    for result in results:
        for row in result["rows"]:
            if row["metric"] in _METRICS and not row["name"].startswith("Prefill"):
                found.setdefault((row["metric"], row["name"], row["protocol_id"]), []).append(row)
    keys = sorted(found, key=lambda key: _METRICS.index(key[0]))
    columns = [_column(found[key][0]) for key in keys]
    places = [max(decimals(row) for row in found[key]) for key in keys]
    base = tuple(
        Cell(format_value(found[key][0], found[key][0]["baseline"], n)) for key, n in zip(keys, places, strict=True)
    )
    lines = [Line("", "Baseline, 16 bit", base)]
    for result in results:
        own = {(row["metric"], row["name"], row["protocol_id"]): row for row in result["rows"]}
        cells = tuple(_cell(own.get(key), n) for key, n in zip(keys, places, strict=True))
        lines.append(Line(str(result["name"]), str(result["label"] or result["name"]), cells))
    return columns, lines


def combined_table(results: Sequence[Mapping[str, Any]]) -> str:
    """The combined table as aligned Markdown."""
    columns, lines = combine(results)
    table = [["Configuration", *(column.heading for column in columns)]]
    table += [[line.label, *(_text(cell) for cell in line.cells)] for line in lines]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    table.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def short_name(row: Row) -> str:
    """A row's name without what all configurations share, e.g. `Perplexity, gptq`."""
    if row["metric"] in DISTANCES:
        return str(row["metric"][0].upper() + row["metric"][1:])
    if row["metric"] == "bits per weight":
        which = str(row["name"]).removeprefix(_BITS)
        return "Bits per weight" if which == "quantized Linears" else f"Bits per weight, {which}"
    match = _PERPLEXITY.match(str(row["name"]))
    return f"Perplexity, {match.group(1)}" if match else str(row["name"])


def _column(row: Row) -> Column:
    name = "Decode" if row["name"].startswith("Decode (") else short_name(row)
    unit = f" ({row['unit']})" if row["unit"] not in ("", "bits") else ""
    arrow = "↑" if row["higher_is_better"] else "↓"
    return Column(f"{name}{unit} {arrow}", row["protocol"], row["name"], row["metric"])


def _cell(row: Row | None, places: int) -> Cell | None:
    if row is None:
        return None
    if row["metric"] == "KL divergence":  # of 8 and of 2 bits differ a thousandfold: each has digits of its own
        places = decimals(row)
    if row["metric"] in ("size", "tokens/s") and row["baseline"]:
        impact = f"{100 * row['impact'] / row['baseline']:+.0f} %"
    elif row["metric"] in DISTANCES:
        impact = f"±{row['interval'][1] - row['impact']:.{places}f}" if row["interval"] else ""
    else:
        impact = f"{row['impact']:+.{places}f}"
    return Cell(format_value(row, row["quantized"], places), impact, row)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return "-"
    return f"{cell.value} ({cell.impact})" if cell.impact else cell.value
