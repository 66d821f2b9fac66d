"""One job, `/job?id=UID`: where it stands, its layers' errors, its log, and what came out, of every configuration.

Everything shown is read from the store and the job's files, so a reload or another browser shows the same. While
the store cannot be read the page says so, keeps what it shows and goes on asking.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.evaluate.combined import short_name
from backend.jobs import control, curves
from backend.jobs.results import measured, results_of
from backend.jobs.store import Job, JobStore
from backend.jobs.usage import USAGE_FILE
from backend.paths import Home
from ui.charts import cost_against_divergence, layer_errors, size_against, tuning_curve
from ui.jobview import actions, badges, history_table, overview, stage_list
from ui.labelsview import add_labels
from ui.layout import ACTION_JS, KEEP_OPEN_JS, card, empty, esc, link, notice, page
from ui.loadways import tasks_of
from ui.logview import LOG_JS, frame_html, functions
from ui.madeview import made, notes
from ui.pages.jobs import act_on, actor_of, digest
from ui.pareto import tradeoff
from ui.reading import asked, briefly, find, store_notice
from ui.resultview import combined_html, result_table
from ui.tensorrtview import tensorrt
from ui.usageview import drawn, pace_s

REFRESH_S = 1.0
IDLE_REFRESH_S = 5.0

Seen = dict[str, Any]  # what this page has shown: uid, digests of its parts, what its charts were drawn from


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    seen = gr.State({})
    with page("jobs"):
        head = gr.HTML(js_on_load=ACTION_JS, elem_id="job-head")
        said = gr.HTML(visible=False)
        facts = gr.HTML()
        result = gr.HTML(visible=False, elem_id="result")
        ran = gr.HTML(visible=False, elem_id="tensorrt")
        with gr.Row(elem_classes=["qd-split"]):
            with gr.Column(scale=2, min_width=320):
                stages = gr.HTML(elem_id="stages")
                remarks = gr.HTML(visible=False, elem_id="notes")
            with gr.Column(scale=3, min_width=420):
                best = gr.Plot(show_label=False, elem_id="tradeoff", elem_classes=["qd-plot"], visible=False)
                scatter = gr.Plot(show_label=False, elem_id="sizes", elem_classes=["qd-plot"], visible=False)
                curve = gr.Plot(show_label=False, elem_id="tuning", elem_classes=["qd-plot"], visible=False)
                chart = gr.Plot(show_label=False, elem_id="layers", elem_classes=["qd-plot"], visible=False)
                taken = gr.Plot(show_label=False, elem_id="usage", elem_classes=["qd-plot"], visible=False)
                words = gr.HTML(visible=False, elem_id="usage-words")
        saved = gr.HTML(visible=False, elem_id="artefact", js_on_load=KEEP_OPEN_JS)
        add_labels(demo, home, seen)
        gr.HTML('<div class="qd-section"><h2>Log</h2></div>')
        gr.HTML(
            frame_html(),
            js_on_load=LOG_JS,
            server_functions=functions(home),
            elem_id="log",
            elem_classes=["qd-log-box"],
        )
        history = gr.HTML(visible=False, elem_id="history")
    timer = gr.Timer(REFRESH_S)
    parts = {
        "head": head, "facts": facts, "result": result, "ran": ran, "stages": stages, "notes": remarks, "made": saved,
        "history": history,
    }  # fmt: skip
    outputs = [seen, timer, said, *parts.values(), best, scatter, curve, chart, taken, words]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def show(now: Seen) -> list[Any]:
        """Everything that changed since this page was last updated."""
        now = dict(now)
        nothing = [gr.skip() for _ in range(len(outputs) - 3)]
        try:
            with briefly():
                job = find(home, str(now.get("uid") or ""))
                events = JobStore(home).history(job.uid) if job else []
                charts = _charts(home, job, now) if job else []
        except JobError as error:
            now["trouble"] = True
            now.pop("pace", None)
            return [now, gr.Timer(REFRESH_S), gr.HTML(store_notice(error), visible=True), *nothing]
        if job is None:
            text = "The address of this page names no job, or one that is not in this home."
            missing = empty("No such job", text, link("All jobs", "/", "primary"))
            return [now, gr.Timer(active=False), gr.HTML(visible=False), missing, *nothing[1:]]
        now["uid"] = job.uid
        told = gr.HTML(visible=False) if now.pop("trouble", None) else gr.skip()
        html = {**_html_parts(job, now.get("turn", 0)), "history": history_table(events)}
        updates = [_changed(now, name, part) for name, part in html.items()]
        return [now, _pace(now, job), told, *updates, *charts]

    def on_load(request: gr.Request) -> list[Any]:
        return show({"uid": request.query_params.get("id", "")})

    def on_action(now: Seen, event: gr.EventData, request: gr.Request) -> tuple[Any, Seen]:
        act, uid = asked(event)
        again = {**now, "turn": now.get("turn", 0) + 1}  # redraws the buttons
        if uid != now.get("uid"):
            return gr.HTML(notice("error", "Nothing was changed", "Reload this page."), visible=True), again
        try:
            with briefly():
                act_on(home, act, uid, actor=actor_of(request))
        except QuantdeckError as error:
            return gr.HTML(notice("error", "Nothing was changed", error.message), visible=True), again
        return gr.HTML(visible=False), again

    demo.load(on_load, None, outputs, **quiet)
    timer.tick(show, [seen], outputs, **quiet)
    head.click(on_action, [seen], [said, seen], **quiet).then(show, [seen], outputs, **quiet)


def _html_parts(job: Job, turn: int) -> dict[str, str]:
    entries = results_of(job.result)
    return {
        "head": head_html(job, turn),
        "facts": overview(job),
        "result": result_html(job),
        "ran": tensorrt(job.uid, entries),
        "stages": card(stage_list(job), "Stages"),
        "notes": notes(entries),
        "made": made(job.uid, entries, tasks_of(job.config_yaml)),
    }


def result_html(job: Job) -> str:
    """The guide's table of a single configuration, or all configurations in one table; nothing before the end."""
    entries = results_of(job.result)
    if not measured(job.result):
        return ""
    if len(entries) > 1:
        return card(combined_html(job.model, entries), classes="qd-flush")
    return card(result_table(job.model, entries[0]["rows"]), classes="qd-flush")


def head_html(job: Job, turn: int = 0) -> str:
    """The job's name, state and what can be done with it.

    Args:
        job: The job.
        turn: Number of clicks answered; a new number draws the buttons anew.
    """
    return (
        f'<div class="qd-title" data-turn="{turn}"><div><a class="qd-small qd-muted" href="/">All jobs</a>'
        f'<h1>{esc(job.job_id)} <span style="vertical-align:4px">{badges(job)}</span></h1></div>'
        f'<div class="qd-actions">{actions(job, here=True)}</div></div>'
    )


def _changed(now: Seen, name: str, html: str) -> Any:
    seen = digest(html)
    if now.get(name) == seen:
        return gr.skip()
    now[name] = seen
    return gr.HTML(html, visible=bool(html))


def _pace(now: Seen, job: Job) -> Any:
    """A job that is over is looked at now and then: it can be resumed from elsewhere."""
    pace = REFRESH_S if job.is_active else IDLE_REFRESH_S
    if now.get("pace") == pace:
        return gr.skip()
    now["pace"] = pace
    return gr.Timer(pace)


def _charts(home: Home, job: Job, now: Seen) -> list[Any]:
    return [_tradeoff(job, now), _scatter(job, now), _curve(home, job, now), _chart(home, job, now),
            *_usage(home, job, now)]  # fmt: skip


def _usage(home: Home, job: Job, now: Seen) -> list[Any]:
    """Chart and words of what the job takes; while it runs not more often than one can see."""
    path = home.run_dir(job.uid) / USAGE_FILE
    version, running = _version(path), job.state in ("running", "cancelling")
    shown = now.get("usage")
    fresh = running and shown and shown[1] and abs(version[1] - shown[0][1]) / 1e9 < pace_s(version[0])
    if shown == [version, running] or fresh:
        return [gr.skip(), gr.skip()]
    now["usage"] = [version, running]
    found = drawn(path, version, job.algorithm, running=running)
    if found is None:
        return [gr.skip(), gr.skip()]
    return [gr.Plot(found[0], visible=True), gr.HTML(found[1], visible=True)]


def _curve(home: Home, job: Job, now: Seen) -> Any:
    version = _version(home.run_dir(job.uid) / "events.jsonl")
    if version == now.get("curve"):
        return gr.skip()
    _, rows = _read(home, job.uid, version)
    now["curve"] = version
    return gr.Plot(tuning_curve(rows), visible=True) if rows else gr.skip()


def _chart(home: Home, job: Job, now: Seen) -> Any:
    labels = {entry["name"]: entry["label"] for entry in results_of(job.result)}
    at_work = job.state in ("starting", "running", "cancelling")  # has a place for what is to come
    state = [_version(home.run_dir(job.uid) / "events.jsonl"), labels, at_work]
    if state == now.get("layers"):
        return gr.skip()
    rows, _ = _read(home, job.uid, state[0])
    shown, now["layers"] = "layers" in now, state
    return gr.Plot(layer_errors(rows, labels), visible=bool(rows or at_work)) if rows or at_work or shown else gr.skip()


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


def _tradeoff(job: Job, now: Seen) -> Any:
    found = tradeoff([(str(entry["name"]), entry["rows"]) for entry in measured(job.result)])
    if found is None or found == now.get("tradeoff"):
        return gr.skip()
    now["tradeoff"] = found
    return gr.Plot(cost_against_divergence(found), visible=True)


def _scatter(job: Job, now: Seen) -> Any:
    points = size_points(measured(job.result))
    if points is None or points == now.get("points"):
        return gr.skip()
    now["points"] = points
    return gr.Plot(size_against(*points), visible=True)


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
        scale = {"GB": 1e3, "MB": 1.0, "kB": 1e-3}.get(str(size["unit"]), 1e-6)
        baseline = baseline or (size["baseline"] * scale, score["baseline"])
        points.append((str(entry["name"]), size["quantized"] * scale, score["quantized"]))
    return (heading, baseline, points) if len(points) > 1 else None
