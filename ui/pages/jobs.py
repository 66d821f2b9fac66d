"""Jobs, `/`: every job of this home, newest first, kept up to date."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.errors import QuantdeckError
from backend.jobs import control
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.format import ago
from ui.jobview import actions, badge, bar, fraction_done, headline, rows_of, run_time
from ui.layout import ACTION_JS, empty, esc, link, notice, page, title

REFRESH_S = 2.0
MAX_COMPARED = 6
COLUMNS = ("Job", "State", "Algorithm", "Progress", "Started", "Run time", "Result", "")


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("jobs"):
        heading = gr.HTML(title("Jobs"))
        said = gr.HTML(visible=False)
        table = gr.HTML(js_on_load=ACTION_JS, elem_id="jobs")
    shown = gr.State("")
    timer = gr.Timer(REFRESH_S)
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def refresh(before: str) -> tuple[object, object, object]:
        jobs = JobStore(home).jobs()
        now = table_html(jobs)
        if now == before:
            return gr.skip(), gr.skip(), gr.skip()
        return title_html(jobs), now, now

    def on_action(event: gr.EventData) -> tuple[object, str]:
        # An empty `shown` makes the next refresh redraw the table, with its buttons active again.
        try:
            said = act_on(home, str(event.act), str(event.uid))
        except QuantdeckError as error:
            return gr.HTML(notice("error", "Nothing was changed", error.message), visible=True), ""
        return gr.HTML(notice("info", said), visible=True) if said else gr.skip(), ""

    demo.load(refresh, [shown], [heading, table, shown], **quiet)
    timer.tick(refresh, [shown], [heading, table, shown], **quiet)
    table.click(on_action, None, [said, shown], **quiet).then(refresh, [shown], [heading, table, shown], **quiet)


def act_on(home: Home, act: str, uid: str) -> str:
    """Do what a button of a job's row or page stands for; returns what to say.

    Raises:
        QuantdeckError: If the job's state does not allow it any more.
    """
    if act == "cancel":
        job = control.cancel(home, uid)
        return f"Job {job.job_id} " + ("was cancelled" if job.state == "cancelled" else "is being stopped")
    if act == "resume":
        job = control.resume(home, uid)
        return f"Job {job.job_id} goes on where it stopped (attempt {job.attempt})"
    return ""


def title_html(jobs: list[Job]) -> str:
    """The heading with what is going on, and the ways to start and to compare."""
    running = sum(job.state in ("running", "cancelling") for job in jobs)
    waiting = sum(job.state == "queued" for job in jobs)
    lead = ", ".join(f"{n} {word}" for n, word in ((running, "running"), (waiting, "waiting")) if n)
    if not jobs:
        return title("Jobs")
    measured = [job.uid for job in jobs if job.state == "succeeded" and rows_of(job)][:MAX_COMPARED]
    buttons = link("Compare results", f"/compare?jobs={','.join(measured)}") if measured else ""
    return title("Jobs", lead or "Nothing is running.", buttons + link("New job", "/new", "primary"))


def table_html(jobs: list[Job]) -> str:
    """All jobs as a table, or the way to the first one."""
    if not jobs:
        return empty(
            "No jobs yet",
            "A job takes a language model, makes it smaller, and measures what that cost: perplexity, accuracy, size "
            "and speed, before and after. The built-in demo model takes the whole path on this machine, without a "
            "download and without a GPU.",
            link("Start with the demo", "/new", "primary"),
        )
    body = "".join(_row(job) for job in jobs)
    head = "".join(f"<th>{word}</th>" for word in COLUMNS)
    return (
        f'<div class="qd-card qd-flush"><div class="qd-scroll"><table class="qd-table"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></div>"
    )


def _row(job: Job) -> str:
    done = fraction_done(job)
    progress = f'{bar(done)}<span class="qd-sub">{100 * done:.0f} %</span>' if job.is_active else ""
    return (
        f'<tr data-job="{esc(job.job_id)}"><td><a class="qd-name" href="/job?id={esc(job.uid)}">{esc(job.job_id)}</a>'
        f'<span class="qd-sub">{esc(job.model)}</span></td><td>{badge(job.state)}</td><td>{esc(job.algorithm)}</td>'
        f'<td>{progress}</td><td class="qd-nowrap">{esc(ago(job.started_at or job.created_at))}</td>'
        f'<td class="qd-nowrap">{esc(run_time(job))}</td><td>{headline(job)}</td>'
        f'<td><div class="qd-row-actions">{actions(job, here=False)}</div></td></tr>'
    )
