"""One job, `/job?id=UID`: where it stands, its layers' errors, its log, and what came out, of every configuration.

Everything shown is read from the store and the job's files, so a reload or another browser shows the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.evaluate.combined import short_name
from backend.jobs import control
from backend.jobs.results import measured, results_of
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.charts import layer_errors, size_against
from ui.jobview import actions, badge, overview, stage_list
from ui.layout import ACTION_JS, card, empty, esc, link, notice, page
from ui.madeview import made, notes
from ui.pages.jobs import act_on
from ui.resultview import combined_html, result_table

REFRESH_S = 1.0
LOG_LINES = 400
# Keeps the log at its end unless the reader has scrolled up; Gradio's `autoscroll` leaves the first load at its top.
FOLLOW_JS = """
const box = element.closest('#log');
let follow = true;
box.addEventListener('scroll', () => { follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40; });
watch('value', () => { if (follow) box.scrollTop = box.scrollHeight; });
"""

Seen = dict[str, Any]  # what this page has shown: uid, log cursor and lines, rows of the charts, HTML of each part


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("jobs"):
        head = gr.HTML(js_on_load=ACTION_JS, elem_id="job-head")
        said = gr.HTML(visible=False)
        facts = gr.HTML()
        result = gr.HTML(visible=False, elem_id="result")
        with gr.Row(elem_classes=["qd-split"]):
            with gr.Column(scale=2, min_width=320):
                stages = gr.HTML(elem_id="stages")
                remarks = gr.HTML(visible=False, elem_id="notes")
            with gr.Column(scale=3, min_width=420):
                scatter = gr.Plot(show_label=False, elem_id="sizes", elem_classes=["qd-plot"], visible=False)
                chart = gr.Plot(show_label=False, elem_id="layers", elem_classes=["qd-plot"], visible=False)
        saved = gr.HTML(visible=False, elem_id="artefact")
        gr.HTML('<div class="qd-section"><h2>Log</h2></div>')
        log = gr.HTML(
            '<p class="qd-muted qd-small">Nothing is written yet.</p>',
            js_on_load=FOLLOW_JS,
            elem_id="log",
            elem_classes=["qd-log-box"],
        )
    seen = gr.State({})
    timer = gr.Timer(REFRESH_S)
    parts = {"head": head, "facts": facts, "result": result, "stages": stages, "notes": remarks, "made": saved}
    outputs = [seen, timer, *parts.values(), scatter, chart, log]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def show(now: Seen) -> list[Any]:
        """Everything that changed since this page was last updated."""
        uid = now.get("uid")
        try:
            job = JobStore(home).get(uid) if uid else None
        except JobError:
            job = None
        if job is None:
            text = "The address of this page names no job, or one that is not in this home."
            missing = empty("No such job", text, link("All jobs", "/", "primary"))
            return [now, gr.Timer(active=False), missing, *[gr.skip() for _ in range(len(outputs) - 3)]]
        now = dict(now)
        updates = [_changed(now, name, html) for name, html in _html_parts(job).items()]
        charts = [_scatter(job, now), _chart(home, job, now)]
        return [now, gr.Timer(active=job.is_active), *updates, *charts, _log(home, job, now)]

    def on_load(request: gr.Request) -> list[Any]:
        return show({"uid": request.query_params.get("id", "")})

    def on_action(now: Seen, event: gr.EventData) -> tuple[Any, Seen]:
        again = {**now, "head": None}  # redraws the buttons
        try:
            act_on(home, str(event.act), str(event.uid))
        except QuantdeckError as error:
            return gr.HTML(notice("error", "Nothing was changed", error.message), visible=True), again
        return gr.HTML(visible=False), again

    demo.load(on_load, None, outputs, **quiet)
    timer.tick(show, [seen], outputs, **quiet)
    head.click(on_action, [seen], [said, seen], **quiet).then(show, [seen], outputs, **quiet)


def _html_parts(job: Job) -> dict[str, str]:
    entries = results_of(job.result)
    return {
        "head": head_html(job),
        "facts": overview(job),
        "result": result_html(job),
        "stages": card(stage_list(job), "Stages"),
        "notes": notes(entries),
        "made": made(job.uid, entries),
    }


def result_html(job: Job) -> str:
    """The guide's table of a single configuration, or all configurations in one table; nothing before the end."""
    entries = results_of(job.result)
    if not measured(job.result):
        return ""
    if len(entries) > 1:
        return card(combined_html(job.model, entries), classes="qd-flush")
    return card(result_table(job.model, entries[0]["rows"]), classes="qd-flush")


def head_html(job: Job) -> str:
    """The job's name, state and what can be done with it."""
    return (
        f'<div class="qd-title"><div><a class="qd-small qd-muted" href="/">All jobs</a>'
        f'<h1>{esc(job.job_id)} <span style="vertical-align:4px">{badge(job.state)}</span></h1></div>'
        f'<div class="qd-actions">{actions(job, here=True)}</div></div>'
    )


def _changed(now: Seen, name: str, html: str) -> Any:
    if now.get(name) == html:
        return gr.skip()
    now[name] = html
    return gr.HTML(html, visible=bool(html))


def _chart(home: Home, job: Job, now: Seen) -> Any:
    rows = control.layer_errors(home, job.uid)
    if rows == now.get("layers", []):
        return gr.skip()
    now["layers"] = rows
    labels = {entry["name"]: entry["label"] for entry in results_of(job.result)}
    return gr.Plot(layer_errors(rows, labels), visible=True)


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


def _log(home: Home, job: Job, now: Seen) -> Any:
    lines, cursor = control.tail_log(home, job.uid, now.get("cursor"))
    if not lines:
        return gr.skip()
    now["cursor"] = cursor
    now["log"] = [*now.get("log", []), *lines][-LOG_LINES:]
    return f'<pre class="qd-log">{esc(chr(10).join(now["log"]))}</pre>'
