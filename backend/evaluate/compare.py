"""Several jobs side by side: one line per job, configuration and number, in JSON, Markdown or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from backend.errors import JobError
from backend.jobs.results import measured

COLUMNS = (
    "job",
    "model",
    "algorithm",
    "configuration",
    "metric",
    "name",
    "unit",
    "protocol",
    "baseline",
    "quantized",
    "impact",
    "interval",
)


class Measured(Protocol):
    """The part of a job that comparison needs."""

    @property
    def job_id(self) -> str:
        """Name of the job."""

    @property
    def model(self) -> str:
        """What was quantized."""

    @property
    def algorithm(self) -> str:
        """How."""

    @property
    def state(self) -> str:
        """Where the job is."""

    @property
    def result(self) -> dict[str, Any] | None:
        """What was measured."""


def comparison_rows(jobs: Sequence[Measured]) -> list[dict[str, Any]]:
    """All numbers of some jobs, grouped so that equal metrics of equal protocols stand together.

    Raises:
        JobError: If a job has no result yet.
    """
    rows = []
    for job in jobs:
        entries = measured(job.result)
        if not entries:
            raise JobError(f"job {job.job_id} is {job.state} and has no measurements to compare")
        named = {"job": job.job_id, "model": job.model, "algorithm": job.algorithm}
        for entry in entries:
            for row in entry["rows"]:
                full = {**named, "configuration": entry["name"], **row}
                rows.append({column: full[column] for column in COLUMNS})
    order = {(r["metric"], r["name"], r["protocol"]): None for r in rows}
    rank = {key: place for place, key in enumerate(order)}
    return sorted(rows, key=lambda r: rank[r["metric"], r["name"], r["protocol"]])


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1000 else str(round(value, 1))


def to_json(rows: list[dict[str, Any]]) -> str:
    """A JSON array of objects, numbers unrounded."""
    return json.dumps(rows, indent=2)


def to_markdown(rows: list[dict[str, Any]]) -> str:
    """A table for people; the impact is followed by its 95 % interval where there is one."""
    lines = ["| Job | Number | Protocol | Baseline | Quantized | Impact |", "|---|---|---|---|---|---|"]
    made = {(row["job"], row["configuration"]) for row in rows}
    several = {job for job, _ in made if sum(job == other for other, _ in made) > 1}
    for row in rows:
        who = f"{row['job']} / {row['configuration']}" if row["job"] in several else row["job"]
        interval = f" [{row['interval'][0]:+.3g}, {row['interval'][1]:+.3g}]" if row["interval"] else ""
        unit = f" ({row['unit']})" if row["unit"] else ""
        lines.append(
            f"| {who} | {row['name']}{unit} | {row['protocol']} | {_number(row['baseline'])} | "
            f"{_number(row['quantized'])} | {row['impact']:+.4g}{interval} |"
        )
    return "\n".join(lines)


def to_csv(rows: list[dict[str, Any]]) -> str:
    """Comma-separated values. Text that a spreadsheet would run as a formula is prefixed with a quote."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*COLUMNS[:-1], "interval_low", "interval_high"])
    for row in rows:
        low, high = row["interval"] or ("", "")
        writer.writerow([*(_inert(row[c]) for c in COLUMNS[:-1]), low, high])
    return stream.getvalue().rstrip("\n")


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


RENDERERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "json": to_json,
    "markdown": to_markdown,
    "csv": to_csv,
}
