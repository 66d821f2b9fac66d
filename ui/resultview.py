"""How measured numbers look: one row's values, a table of rows, several configurations in one table. Returns HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backend.evaluate.combined import Cell, Line, combine
from backend.evaluate.report import decimals, format_value
from backend.evaluate.report import title as metric_title
from ui.format import significant
from ui.layout import esc

Row = Mapping[str, Any]
Entry = Mapping[str, Any]


def value_text(row: Row, value: float) -> str:
    """A number in a row's unit, e.g. `7.32`, `60.66 %`, `83.4 tokens/s`.

    It gets as many decimals as make the row's impact visible, the same as in the command line's table.
    """
    return f"{format_value(dict(row), value)} {row.get('unit') or ''}".strip()


def _difference(row: Row, value: float) -> str:
    """A signed difference; differences of percentages are points."""
    unit = {"%": "points"}.get(str(row.get("unit") or ""), row.get("unit") or "")
    sign = "+" if value > 0 else ""
    return f"{sign}{value:.{decimals(dict(row))}f} {unit}".strip()


def impact_text(row: Row) -> str:
    """The signed difference quantized minus baseline, in the row's unit."""
    return _difference(row, row["impact"])


def impact_class(row: Row) -> str:
    """CSS class of an impact: better, worse, or neither.

    A measured number is only called better or worse if its interval excludes zero; sizes and bits have no noise.
    """
    impact, interval = row["impact"], row.get("interval")
    certain = row["metric"] in ("size", "bits per weight") if not interval else not interval[0] <= 0 <= interval[1]
    if not impact or not certain:
        return "qd-delta-none"
    return "qd-delta-good" if (impact > 0) == bool(row["higher_is_better"]) else "qd-delta-bad"


def interval_text(row: Row) -> str:
    """The 95 % interval of the difference; empty where none is defined."""
    interval = row.get("interval")
    if not interval:
        return ""
    low, high = (_difference({**row, "unit": ""}, bound) for bound in interval)
    return f"{low} to {high}" + (", within noise" if interval[0] <= 0 <= interval[1] else "")


def ratio_text(row: Row) -> str:
    """Quantized against baseline as a factor, for sizes, memory and speeds; empty for scores."""
    baseline, quantized = row["baseline"], row["quantized"]
    if row["metric"] not in ("size", "tokens/s", "peak memory") or not baseline:
        return ""
    if row["metric"] == "tokens/s":
        return f"{significant(quantized / baseline)} times as fast"
    return f"{significant(100 * quantized / baseline)} % of the baseline"


def number_cells(row: Row) -> str:
    """The last cells of a table row: baseline, quantized, impact with its 95 % interval and factor."""
    below = " · ".join(part for part in (interval_text(row), ratio_text(row)) if part)
    method = f' title="95 % interval: {esc(row["interval_method"])}"' if row.get("interval_method") else ""
    reused = (
        f'<span class="qd-sub">reused from {esc(str(row["cached_at"])[:10])}</span>' if row.get("cached_at") else ""
    )
    return (
        f'<td class="qd-num">{esc(value_text(row, row["baseline"]))}{reused}</td>'
        f'<td class="qd-num">{esc(value_text(row, row["quantized"]))}</td>'
        f'<td class="qd-num"{method}><span class="{impact_class(row)}">{esc(impact_text(row))}</span>'
        f'<span class="qd-sub">{esc(below)}</span></td>'
    )


def result_table(model: str, rows: Sequence[Row]) -> str:
    """The guide's table: Model, Task, Metric, Baseline, Quantized, Impact."""
    body = "".join(
        f"<tr><td>{esc(model)}</td>"
        f'<td>{esc(row["name"])}<span class="qd-sub">{esc(row["protocol"])}</span></td>'
        f'<td class="qd-nowrap">{esc(metric_words(row))}</td>'
        f"{number_cells(row)}</tr>"
        for row in rows
    )
    return (
        '<div class="qd-scroll"><table class="qd-table qd-result qd-numbers qd-flow"><thead><tr><th>Model</th>'
        '<th>Task</th><th>Metric</th><th class="qd-num">Baseline</th><th class="qd-num">Quantized</th>'
        f'<th class="qd-num">Impact</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def combined_html(model: str, entries: Sequence[Entry]) -> str:
    """All configurations of a job: a line each, the baseline first; below it every configuration's own table."""
    columns, lines = combine(entries)
    reasons = {str(entry["name"]): entry.get("reason") for entry in entries}
    head = "".join(f'<th class="qd-num" title="{esc(c.protocol)}">{esc(c.heading)}</th>' for c in columns)
    body = "".join(_line(line, reasons.get(line.name)) for line in lines)
    single = "".join(
        f"<details><summary>{esc(entry['label'] or entry['name'])}: all numbers, protocols and intervals</summary>"
        f"{result_table(model, entry['rows'])}</details>"
        for entry in entries
        if entry["rows"]
    )
    return (
        '<div class="qd-scroll"><table class="qd-table" id="configurations"><thead><tr><th>Configuration</th>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>{single}"
    )


def _line(line: Line, reason: Any) -> str:
    told = f'<span class="qd-sub qd-delta-bad">{esc(reason)}</span>' if reason else ""
    cells = "".join(_cell(cell) for cell in line.cells)
    css = "" if line.name else ' class="qd-baseline"'
    return f"<tr{css}><td><strong>{esc(line.label)}</strong>{told}</td>{cells}</tr>"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return '<td class="qd-num qd-muted">-</td>'
    below = ""
    if cell.row is not None and cell.impact:
        css = "qd-muted" if cell.impact.startswith("±") else impact_class(cell.row)
        below = f'<span class="qd-sub"><span class="{css}">{esc(cell.impact)}</span></span>'
    return f'<td class="qd-num">{esc(cell.value)}{below}</td>'


def metric_words(row: Row) -> str:
    """The metric with an arrow in the direction of improvement."""
    return f"{metric_title(dict(row))} {'↑' if row['higher_is_better'] else '↓'}"
