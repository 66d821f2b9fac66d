"""How one job looks: badge, headline, actions, stages, facts. All functions return HTML."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.jobs.results import measured, results_of
from backend.jobs.store import Job
from ui.format import ago, duration, elapsed, moment, significant, size
from ui.layout import action, card, esc, facts, link, notice
from ui.resultview import impact_class, impact_text

STATE_WORDS = {
    "queued": "Waiting",
    "running": "Running",
    "cancelling": "Cancelling",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
# In the order of the runner's work; the names are those of its events.
STAGES = (
    ("download", "Get model and text"),
    ("calibrate", "Calibrate"),
    ("quantize", "Quantize layer by layer"),
    ("save", "Save the model"),
    ("evaluate_baseline", "Evaluate the baseline"),
    ("evaluate_quantized", "Evaluate the quantized model"),
    ("benchmark", "Benchmark both in turns"),
    ("report", "Compare and report"),
)

Row = Mapping[str, Any]


def badge(state: str) -> str:
    """The coloured state of a job."""
    return f'<span class="qd-badge qd-s-{esc(state)}">{esc(STATE_WORDS.get(state, state))}</span>'


def bar(fraction: float) -> str:
    """A progress bar; `fraction` from 0 to 1."""
    percent = f"{100 * min(1.0, max(0.0, fraction)):.0f}"
    return (
        f'<div class="qd-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )


def stage_index(name: str) -> int:
    """Place of a stage in `STAGES`; -1 if the runner has not named one yet."""
    plain = {"publish": "save"}.get(name, name)
    return next((i for i, (key, _) in enumerate(STAGES) if key == plain), -1)


def fraction_done(job: Job) -> float:
    """Share of the whole job that is done, from 0 to 1; every stage counts the same."""
    if job.state == "succeeded":
        return 1.0
    index = stage_index(str(job.progress.get("stage", "")))
    if index < 0:
        return 0.0
    step, total = job.progress.get("step") or 0, job.progress.get("total") or 0
    return (index + (step / total if total else 0.0)) / len(STAGES)


def rows_of(job: Job) -> list[Row]:
    """The comparison rows of a finished job; empty if there are none."""
    return list((job.result or {}).get("rows") or [])


def headline(job: Job) -> str:
    """The result in a few words: perplexity change and size ratio; else why there is none."""
    found, made = measured(job.result), len(results_of(job.result))
    parts = []
    if made > 1:
        parts.append(f"{made} configurations")
    changes = [row for entry in found if (row := _first(entry["rows"], "perplexity"))]
    if len(found) == 1 and changes:
        shown = f"perplexity {impact_text(changes[0])}"
        parts.append(f'<span class="{impact_class(changes[0])}">{esc(shown)}</span>')
    elif changes:
        least, most = min(changes, key=_impact), max(changes, key=_impact)
        parts.append(f"perplexity {esc(impact_text(least))} to {esc(impact_text(most))}")
    sizes = [row for entry in found if (row := _first(entry["rows"], "size")) and row["baseline"]]
    if sizes:
        shares = sorted({significant(100 * row["quantized"] / row["baseline"]) for row in sizes}, key=float)
        parts.append(f"{' to '.join(dict.fromkeys((shares[0], shares[-1])))} % of the size")
    if parts and job.state == "succeeded":
        return ", ".join(parts)
    if job.reason:
        short = job.reason if len(job.reason) <= 90 else job.reason[:87] + "..."
        return f'<span class="qd-muted" title="{esc(job.reason)}">{esc(short)}</span>'
    return ", ".join(parts)


def _first(rows: list[Row], metric: str) -> Row | None:
    return next((row for row in rows if row["metric"] == metric), None)


def _impact(row: Row) -> float:
    return float(row["impact"])


def run_time(job: Job) -> str:
    """How long the job has run or ran."""
    if job.started_at is None:
        return "-"
    return duration(elapsed(job.started_at, job.finished_at))


def actions(job: Job, *, here: bool) -> str:
    """What can be done with the job now; only what makes sense in its state is offered.

    Args:
        job: The job.
        here: True on the job's own page, which needs no Open, and where there is room for more.
    """
    rows = rows_of(job)
    buttons = []
    if not here:
        buttons.append(link("Open", f"/job?id={job.uid}"))
    if here and job.state == "succeeded":
        buttons.append(link("Chat with both", f"/chat?job={job.uid}", "primary"))
        if rows:
            buttons.append(link("Compare", f"/compare?jobs={job.uid}"))
    if job.state in ("failed", "cancelled"):
        buttons.append(action("Resume", "resume", job.uid, title="Go on where it stopped; what is finished stays"))
    buttons.append(link("Clone", f"/new?clone={job.uid}", title="Open the same settings as a new job"))
    buttons.append(
        link("YAML", f"/download/{job.uid}.yaml", title="Download the job file", download=f"{job.job_id}.yaml")
    )
    if job.state in ("queued", "running"):
        ask = f"Cancel job {job.job_id}? What it has finished is kept, and it can be resumed later."
        buttons.append(action("Cancel", "cancel", job.uid, kind="danger", confirm=ask))
    return "".join(buttons)


def stage_list(job: Job) -> str:
    """All stages with the present one's bar by layer, its time left, and the times of finished ones."""
    timings: Mapping[str, Any] = (job.result or {}).get("timings") or {}
    index = len(STAGES) if job.state == "succeeded" else stage_index(str(job.progress.get("stage", "")))
    items = []
    for i, (key, words) in enumerate(STAGES):
        spent = timings.get(key) or timings.get({"save": "publish"}.get(key, "")) or {}
        took = duration(spent["wall_s"]) if "wall_s" in spent else ""
        if job.state == "succeeded" and not spent:
            continue  # a stage that this job did not need
        kind, detail, mark = "qd-todo", "", ""
        if i < index:
            kind, mark = "qd-done", "✓"
        elif i == index and job.is_active:
            kind, detail = "qd-now", _present(job)
        elif i == index:
            kind, mark = "qd-stopped", "!"
        items.append(
            f'<li class="{kind}"><span class="qd-dot">{mark}</span><span>{esc(words)}</span>'
            f"<time>{esc(took)}</time>{detail}</li>"
        )
    return f'<ol class="qd-stages">{"".join(items)}</ol>'


def _present(job: Job) -> str:
    step, total = job.progress.get("step") or 0, job.progress.get("total") or 0
    words = []
    if job.progress.get("configuration"):
        words.append(str(job.progress["configuration"]))
    if total:
        words.append(f"{step} of {total}")
    if job.progress.get("message"):
        words.append(str(job.progress["message"]))
    if job.progress.get("eta_s") is not None and step < total:
        words.append(f"about {duration(job.progress['eta_s'])} left")
    text = " · ".join(words) or "starting"
    return f'<div class="qd-detail">{bar(step / total) if total else ""}{esc(text)}</div>'


def overview(job: Job) -> str:
    """The facts of a job in one card, with the reason of a wait or failure above it."""
    when = moment(job.created_at)
    rows = [
        ("Model", job.model),
        ("Algorithm", job.algorithm),
        ("Device", (job.result or {}).get("device") or ("CPU" if job.device == "cpu" else job.device)),
        ("Submitted", f"{ago(job.created_at)}" + (f" ({when.astimezone():%H:%M})" if when else "")),
        ("Run time", run_time(job) + (f", attempt {job.attempt}" if job.attempt > 1 else "")),
        ("Peak memory", size((job.result or {}).get("peak_rss_bytes"))),
    ]
    return f'<div class="qd-stack">{_reason(job)}{card(facts([row for row in rows if row[1] != "-"]))}</div>'


def _reason(job: Job) -> str:
    if job.state == "failed":
        reason = (job.reason or "No reason was recorded; see the log").rstrip(".") + "."
        single = job.artefact and len(results_of(job.result)) < 2
        kept = f" The quantized model was saved before and stays in {job.artefact}." if single else ""
        return notice("error", "This job failed", reason + kept)
    if job.state == "queued" and job.reason:
        return notice("info", "This job waits", job.reason)
    if job.state == "cancelled":
        return notice("warn", "This job was cancelled", job.reason or "")
    return ""
