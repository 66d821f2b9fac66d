"""One job, `/job?id=UID`: where it stands, its layers' errors, its log, and what came out, of every configuration.

Everything shown is read from the store and the job's files, so a reload or another browser shows the same. While
the store cannot be read the page says so, keeps what it shows and goes on asking.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.jobs.results import measured, results_of
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.jobcharts import CHARTS, Seen, chart_updates
from ui.jobview import actions, badges, history_table, overview, stage_list
from ui.labelsview import add_labels
from ui.layout import ACTION_JS, KEEP_OPEN_JS, card, empty, esc, link, notice, page
from ui.liveplot import LIVE_PLOT_JS
from ui.loadways import tasks_of
from ui.logview import LOG_JS, frame_html, functions
from ui.madeview import made, notes
from ui.pages.jobs import act_on, actor_of, digest
from ui.reading import asked, briefly, find, store_notice
from ui.resultview import combined_html, result_table
from ui.tensorrtview import tensorrt

REFRESH_S = 1.0
IDLE_REFRESH_S = 5.0


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
                plots = [
                    gr.Plot(show_label=False, elem_id=name, elem_classes=["qd-plot"], visible=False) for name in CHARTS
                ]
                words = gr.HTML(visible=False, elem_id="usage-words")
                live = gr.HTML(js_on_load=LIVE_PLOT_JS, elem_id="live-charts")
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
    outputs = [seen, timer, said, *parts.values(), *plots, words, live]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def show(now: Seen) -> list[Any]:
        """Everything that changed since this page was last updated."""
        now = dict(now)
        nothing = [gr.skip() for _ in range(len(outputs) - 3)]
        try:
            with briefly():
                job = find(home, str(now.get("uid") or ""))
                events = JobStore(home).history(job.uid) if job else []
                charts = chart_updates(home, job, now) if job else []
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
