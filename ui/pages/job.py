"""One job, `/job?id=UID`: where it stands, its layers' errors, its log, and what came out.

Everything shown is read from the store and the job's files, so a reload or another browser shows the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.jobs import control
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.charts import layer_errors
from ui.jobview import actions, artefact, badge, overview, result_table, rows_of, stage_list
from ui.layout import ACTION_JS, card, empty, esc, link, notice, page

REFRESH_S = 1.0
LOG_LINES = 400
# Keeps the log at its end unless the reader has scrolled up; Gradio's `autoscroll` leaves the first load at its top.
FOLLOW_JS = """
const box = element.closest('#log');
let follow = true;
box.addEventListener('scroll', () => { follow = box.scrollHeight - box.scrollTop - box.clientHeight < 40; });
watch('value', () => { if (follow) box.scrollTop = box.scrollHeight; });
"""

Seen = dict[str, Any]  # what this page has shown: uid, log cursor and lines, number of layers, HTML of each part


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
            with gr.Column(scale=3, min_width=420):
                chart = gr.Plot(show_label=False, elem_id="layers", elem_classes=["qd-plot"], visible=False)
        made = gr.HTML(visible=False, elem_id="artefact")
        gr.HTML('<div class="qd-section"><h2>Log</h2></div>')
        log = gr.HTML(
            '<p class="qd-muted qd-small">Nothing is written yet.</p>',
            js_on_load=FOLLOW_JS,
            elem_id="log",
            elem_classes=["qd-log-box"],
        )
    seen = gr.State({})
    timer = gr.Timer(REFRESH_S)
    parts = {"head": head, "facts": facts, "result": result, "stages": stages, "made": made}
    outputs = [seen, timer, *parts.values(), chart, log]
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
        return [now, gr.Timer(active=job.is_active), *updates, _chart(home, job, now), _log(home, job, now)]

    def on_load(request: gr.Request) -> list[Any]:
        return show({"uid": request.query_params.get("id", "")})

    def on_action(now: Seen, event: gr.EventData) -> tuple[Any, Seen]:
        again = {**now, "head": None}  # redraws the buttons
        try:
            control.cancel(home, str(event.uid))
        except QuantdeckError as error:
            return gr.HTML(notice("error", "Nothing was cancelled", error.message), visible=True), again
        return gr.HTML(visible=False), again

    demo.load(on_load, None, outputs, **quiet)
    timer.tick(show, [seen], outputs, **quiet)
    head.click(on_action, [seen], [said, seen], **quiet).then(show, [seen], outputs, **quiet)


def _html_parts(job: Job) -> dict[str, str]:
    made = artefact(job, files_of(Path(job.artefact))) if job.artefact else ""
    return {
        "head": head_html(job),
        "facts": overview(job),
        "result": card(result_table(job), classes="qd-flush") if rows_of(job) else "",
        "stages": card(stage_list(job), "Stages"),
        "made": made,
    }


def head_html(job: Job) -> str:
    """The job's name, state and what can be done with it."""
    return (
        f'<div class="qd-title"><div><a class="qd-small qd-muted" href="/">All jobs</a>'
        f'<h1>{esc(job.job_id)} <span style="vertical-align:4px">{badge(job.state)}</span></h1></div>'
        f'<div class="qd-actions">{actions(job, here=True)}</div></div>'
    )


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file of an artefact; empty if it was removed."""
    if not folder.is_dir():
        return []
    return sorted((f.name, f.stat().st_size) for f in folder.iterdir() if f.is_file())


def _changed(now: Seen, name: str, html: str) -> Any:
    if now.get(name) == html:
        return gr.skip()
    now[name] = html
    return gr.HTML(html, visible=bool(html))


def _chart(home: Home, job: Job, now: Seen) -> Any:
    rows = control.layer_errors(home, job.uid)
    if len(rows) == now.get("layers", 0):
        return gr.skip()
    now["layers"] = len(rows)
    return gr.Plot(layer_errors(rows), visible=True)


def _log(home: Home, job: Job, now: Seen) -> Any:
    lines, cursor = control.tail_log(home, job.uid, now.get("cursor"))
    if not lines:
        return gr.skip()
    now["cursor"] = cursor
    now["log"] = [*now.get("log", []), *lines][-LOG_LINES:]
    return f'<pre class="qd-log">{esc(chr(10).join(now["log"]))}</pre>'
