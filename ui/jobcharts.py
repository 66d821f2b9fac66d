"""The charts of a job's page: which of them have something new, and whether that is drawn anew or added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from backend.disk import BYTE_UNITS
from backend.evaluate.combined import short_name
from backend.jobs import control, curves
from backend.jobs.results import measured, results_of
from backend.jobs.store import Job
from backend.jobs.usage import USAGE_FILE
from backend.paths import Home
from ui.charts import cost_against_divergence, layer_errors, size_against, tuning_curve
from ui.liveplot import carried
from ui.pareto import tradeoff
from ui.usageview import drawn, pace_s

CHARTS = ("tradeoff", "sizes", "tuning", "layers", "usage")
"""`elem_id` of each, in the order of the page."""

Seen = dict[str, Any]
"""What a page has shown so far; `drawn` are the charts that stand in it."""


def chart_updates(home: Home, job: Job, now: Seen) -> list[Any]:
    """What is new, for the outputs `CHARTS`, the words below the last one, and the HTML that carries figures.

    Args:
        home: The home.
        job: The job.
        now: Changed to what the page has shown then.
    """
    usage, words = _usage(home, job, now)
    found = (_tradeoff(job, now), _scatter(job, now), _curve(home, job, now), _layers(home, job, now), usage)
    live, updates = "", []
    for chart, figure in zip(CHARTS, found, strict=True):
        if isinstance(figure, go.Figure) and chart in now.get("drawn", ()):
            live += carried(chart, figure)
            figure = None
        elif isinstance(figure, go.Figure):
            now["drawn"] = [*now.get("drawn", ()), chart]
            figure = gr.Plot(figure, visible=True)
        updates.append(gr.skip() if figure is None else figure)
    return [*updates, gr.HTML(words, visible=True) if words else gr.skip(), gr.HTML(live) if live else gr.skip()]


def _usage(home: Home, job: Job, now: Seen) -> tuple[go.Figure | None, str]:
    """Chart and words of what the job takes; while it runs not more often than one can see."""
    path = home.run_dir(job.uid) / USAGE_FILE
    version, running = _version(path), job.state in ("running", "cancelling")
    before = now.get("usage")
    fresh = running and before and before[1] and abs(version[1] - before[0][1]) / 1e9 < pace_s(version[0])
    if before == [version, running] or fresh:
        return None, ""
    now["usage"] = [version, running]
    return drawn(path, version, job.algorithm, running=running) or (None, "")


def _curve(home: Home, job: Job, now: Seen) -> go.Figure | None:
    version = _version(home.run_dir(job.uid) / "events.jsonl")
    if version == now.get("curve"):
        return None
    _, rows = _read(home, job.uid, version)
    now["curve"] = version
    return tuning_curve(rows) if rows else None


def _layers(home: Home, job: Job, now: Seen) -> Any:
    labels = {entry["name"]: entry["label"] for entry in results_of(job.result)}
    at_work = job.state in ("starting", "running", "cancelling")  # has a place for what is to come
    state = [_version(home.run_dir(job.uid) / "events.jsonl"), labels, at_work]
    if state == now.get("layers"):
        return None
    rows, _ = _read(home, job.uid, state[0])
    now["layers"] = state
    if rows or at_work:
        return layer_errors(rows, labels)
    if "layers" not in now.get("drawn", ()):
        return None
    now["drawn"] = [chart for chart in now["drawn"] if chart != "layers"]
    return gr.Plot(visible=False)


def _version(path: Path) -> tuple[int, int]:
    """Size and time of a file; both 0 if there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=32)
def _read(home: Home, uid: str, version: tuple[int, int]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Layers and steps of tuning, read once for all visitors as long as the job's events are of that version."""
    found, _ = control.events(home, uid)
    return curves.layers(found), curves.steps(found)


def _tradeoff(job: Job, now: Seen) -> go.Figure | None:
    found = tradeoff([(str(entry["name"]), entry["rows"]) for entry in measured(job.result)])
    if found is None or found == now.get("tradeoff"):
        return None
    now["tradeoff"] = found
    return cost_against_divergence(found)


def _scatter(job: Job, now: Seen) -> go.Figure | None:
    points = size_points(measured(job.result))
    if points is None or points == now.get("points"):
        return None
    now["points"] = points
    return size_against(*points)


def size_points(entries: Sequence[Mapping[str, Any]]) -> tuple[str, Any, Any] | None:
    """What the chart of size against perplexity shows; None if there is nothing to choose between.

    Returns:
        Name of the perplexity, (MB, perplexity) of the baseline, (label, MB, perplexity) of each configuration.
    """
    points, heading, baseline = [], "", None
    for entry in entries:
        size = next((row for row in entry["rows"] if row["metric"] == "size"), None)
        rows = [row for row in entry["rows"] if row["metric"] == "perplexity"]
        score = next((row for row in rows if not heading or short_name(row) == heading), None)
        if size is None or score is None:
            continue
        heading = heading or short_name(score)
        scale = BYTE_UNITS[str(size["unit"])] / 1e6
        baseline = baseline or (size["baseline"] * scale, score["baseline"])
        points.append((str(entry["name"]), size["quantized"] * scale, score["quantized"]))
    return (heading, baseline, points) if len(points) > 1 else None
