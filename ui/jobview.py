"""How one job looks: badge, headline, actions, stages, facts, history. All functions return HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs.outcomes import advice
from backend.jobs.results import measured, results_of
from backend.jobs.stage_names import index_of, seconds, shown_stages
from backend.jobs.states import FINAL
from backend.jobs.store import Job
from backend.schema import parse_yaml
from ui.format import ago, clock, duration, elapsed, moment, significant, size
from ui.layout import REMOTE_CODE, action, card, esc, facts, link, notice
from ui.resultview import impact_class, impact_text

STATE_WORDS = {
    "queued": "Waiting",
    "starting": "Starting",
    "running": "Running",
    "cancelling": "Cancelling",
    "lost": "Lost",
    "succeeded": "Succeeded",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
MAX_HISTORY = 20  # changes of state shown; a job that was resumed often has more
RETRY = "To retry it, press Resume: it goes on where it stopped. Clone begins a new job with the same settings."
MAX_REASON = 90  # characters of a reason in the list; all of it is on the job's page
CANCELLABLE = ("queued", "starting", "running", "lost")

Row = Mapping[str, Any]


def badge(state: str) -> str:
    """The coloured state of a job."""
    return f'<span class="qd-badge qd-s-{esc(state)}">{esc(STATE_WORDS.get(state, state))}</span>'


def badges(job: Job) -> str:
    """The state, and beside it whether the runner has been silent for a while."""
    silent = ' <span class="qd-badge qd-s-stalled">No sign of life</span>' if is_silent(job) else ""
    word = "Half deleted" if job.erased else "Deleted"
    gone = f' <span class="qd-badge qd-s-lost">{word}</span>' if job.deleted_at else ""
    return badge(job.state) + silent + gone


def is_silent(job: Job) -> bool:
    """Whether a job that should be at work has not been heard of for a while."""
    return bool(job.stalled) and job.state in ("starting", "running", "cancelling")


def bar(fraction: float) -> str:
    """A progress bar; `fraction` from 0 to 1."""
    percent = f"{100 * min(1.0, max(0.0, fraction)):.0f}"
    return (
        f'<div class="qd-bar" role="progressbar" aria-valuemin="0" aria-valuemax="100" aria-valuenow="{percent}">'
        f'<i style="width:{percent}%"></i></div>'
    )


def stage_index(job: Job) -> int:
    """Place of the present stage in `shown_stages`; -1 if the runner has not named one yet."""
    progress = job.progress
    return index_of(job.algorithm, str(progress.get("stage", "")), str(progress.get("configuration") or ""))


def fraction_done(job: Job) -> float:
    """Share of the whole job that is done, from 0 to 1; every stage counts the same."""
    if job.state == "succeeded":
        return 1.0
    index = stage_index(job)
    if index < 0:
        return 0.0
    step, total = number(job.progress.get("step")), number(job.progress.get("total"))
    return (index + (min(1.0, step / total) if total > 0 else 0.0)) / len(shown_stages(job.algorithm))


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
    return reason_line(job) or ", ".join(parts)


def reason_line(job: Job) -> str:
    """Why the job waits, failed or was cancelled, cut to a line; nothing if it says nothing."""
    if not job.reason:
        return ""
    short = job.reason if len(job.reason) <= MAX_REASON else job.reason[: MAX_REASON - 3] + "..."
    return f'<span class="qd-muted" title="{esc(job.reason[:1000])}">{esc(short)}</span>'


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
    if job.deleted_at:
        return _ways_back(job, here=here)
    rows = rows_of(job)
    buttons = []
    if not here:
        buttons.append(link("Open", f"/job?id={job.uid}"))
    if here and job.state == "succeeded":
        buttons.append(link("Chat with both", f"/chat?job={job.uid}", "primary"))
        if rows:
            buttons.append(link("Compare", f"/compare?jobs={job.uid}"))
    if job.state in ("failed", "cancelled"):
        buttons.append(
            action("Resume", "resume", job.uid, title="Retry: go on where it stopped; what is finished stays")
        )
    if here and can_be_measured(job):
        ask = f"Measure job {job.job_id} again? The saved model stays; its numbers are replaced by the new ones."
        hint = "Evaluate and benchmark the saved model once more"
        buttons.append(action("Measure again", "measure", job.uid, confirm=ask, title=hint))
    buttons.append(link("Clone", f"/new?clone={job.uid}", title="Open the same settings as a new job"))
    buttons.append(
        link("YAML", f"/download/{job.uid}.yaml", title="Download the job file", download=f"{job.job_id}.yaml")
    )
    if here and job.state == "succeeded":
        hint = "Download all that makes this result again: job file, versions, seed, command, checksums; no weights"
        buttons.append(link("Reproduce", f"/download/{job.uid}.zip", title=hint, download=f"{job.job_id}.zip"))
    if job.state in CANCELLABLE:
        ask = f"Cancel job {job.job_id}? What it has finished is kept, and it can be resumed later."
        buttons.append(action("Cancel", "cancel", job.uid, kind="danger", confirm=ask))
    if here and job.state in FINAL:
        hint = "Take it out of the list; its files stay, and it can be restored"
        buttons.append(action("Delete", "delete", job.uid, kind="danger", title=hint))
    return "".join(buttons)


def _ways_back(job: Job, *, here: bool) -> str:
    """What can be done with a deleted job; for good only from the list, which asks first and tells what that frees."""
    back = "" if job.erased else action("Restore", "restore", job.uid, title="Put it back into the list")
    if here:
        return back
    hint = "Remove its files; you are asked once more"
    for_good = action("Delete for good", "ask-erase", job.uid, kind="danger", title=hint)
    return ("" if job.erased else link("Open", f"/job?id={job.uid}")) + back + for_good


def can_be_measured(job: Job) -> bool:
    """Whether the job is over and has a saved model whose numbers can be taken once more."""
    return job.state == "succeeded" or (job.state in ("failed", "cancelled") and bool(job.artefact))


def stage_list(job: Job) -> str:
    """All stages with the present one's bar by layer, its time left, and the times of finished ones."""
    timings: Mapping[str, Any] = (job.result or {}).get("timings") or {}
    stages = shown_stages(job.algorithm)
    index = len(stages) if job.state == "succeeded" else stage_index(job)
    items = []
    for i, stage in enumerate(stages):
        spent = seconds(stage, timings)
        took = duration(spent) if spent is not None else ""
        if job.state == "succeeded" and spent is None:
            continue  # a stage that this job did not need
        kind, detail, mark = "qd-todo", "", ""
        if job.state == "succeeded" and "trtllm_bench" in stage.names and (job.result or {}).get("incomplete"):
            took, detail = "", '<div class="qd-detail">not possible on this machine</div>'
        elif i < index:
            kind, mark = "qd-done", "✓"
        elif i == index and job.is_active:
            kind, detail = "qd-now", _present(job)
        elif i == index:
            kind, mark = "qd-stopped", "!"
        items.append(
            f'<li class="{kind}"><span class="qd-dot">{mark}</span><span>{esc(stage.label)}</span>'
            f"<time>{esc(took)}</time>{detail}</li>"
        )
    return f'<ol class="qd-stages">{"".join(items)}</ol>'


def _present(job: Job) -> str:
    step, total = number(job.progress.get("step")), number(job.progress.get("total"))
    words = []
    if job.progress.get("configuration"):
        words.append(str(job.progress["configuration"]))
    if total:
        words.append(f"{step:.0f} of {total:.0f}")
    if job.progress.get("message"):
        words.append(str(job.progress["message"]))
    if left := time_left(job):
        words.append(left)
    text = " · ".join(words) or "starting"
    return f'<div class="qd-detail">{bar(step / total) if total else ""}{esc(text)}</div>'


def number(value: Any) -> float:
    """A number of a progress report; 0 for what is none."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else 0.0


def time_left(job: Job) -> str:
    """How long the present stage still takes, in words; empty if it is not known, or done."""
    step, total, left = (job.progress.get(key) for key in ("step", "total", "eta_s"))
    if left is None or number(step) >= number(total):
        return ""
    return f"about {duration(number(left))} left"


def progress_cell(job: Job) -> str:
    """The list's column: how far a job at work has come, at what, and how long the stage still takes."""
    if job.state not in ("starting", "running", "cancelling"):
        return ""
    if job.state == "cancelling":
        return f'<span class="qd-sub">{esc(rung(job))}</span>'
    done, index = fraction_done(job), stage_index(job)
    words = [f"{100 * done:.0f} %", shown_stages(job.algorithm)[index].label if index >= 0 else "", time_left(job)]
    return f'{bar(done)}<span class="qd-sub">{esc(" · ".join(word for word in words if word))}</span>'


def rung(job: Job) -> str:
    """How far a cancel has come: what was asked of the job's programs so far."""
    said = str(job.progress.get("message") or "")
    if said.startswith("cancelling:"):
        return said.partition(":")[2].strip()
    if said.startswith("waiting for processes"):  # not even SIGKILL ends them
        return said
    return "the job was told to stop, and has not answered yet"


def overview(job: Job) -> str:
    """The facts of a job in one card, with the reason of a wait or failure above it."""
    when = moment(job.created_at)
    attempts = f", attempt {job.attempt}" if job.attempt > 1 else ""
    limit = job.time_limit_s
    rows = [
        ("Model", job.model),
        ("Algorithm", job.algorithm),
        ("Device", (job.result or {}).get("device") or ("CPU" if job.device == "cpu" else job.device)),
        ("Priority", str(job.priority) if job.priority else "-"),
        ("Submitted", f"{ago(job.created_at)}" + (f" ({when.astimezone():%H:%M})" if when else "")),
        ("Run time", run_time(job) + (attempts if job.started_at else "")),
        ("Attempts", f"{job.attempt} of {job.max_attempts}" if job.is_active and job.attempt > 1 else "-"),
        ("Time limit", duration(limit) if limit else "-"),
        ("Peak memory", size((job.result or {}).get("peak_rss_bytes"))),
    ]
    return f'<div class="qd-stack">{notices(job)}{card(facts([row for row in rows if row[1] != "-"]))}</div>'


@lru_cache(maxsize=64)
def runs_remote_code(config_yaml: str) -> bool:
    """Whether a job asks to run code that comes with its model."""
    try:
        return parse_yaml(config_yaml).config.TRUST_REMOTE_CODE
    except QuantdeckError:  # a file of an older version
        return False


def notices(job: Job) -> str:
    """What one should know of a job before anything else: why it waits, fails or is silent, and what to do."""
    told = ""
    if job.deleted_at:
        text = "It is in no list and keeps its files. Restore it, or delete it for good: page Jobs, Deleted."
        told = notice("warn", "This job is deleted", text)
    told += (notice("error", *REMOTE_CODE) if runs_remote_code(job.config_yaml) else "") + _told(job)
    if is_silent(job):
        told += notice(
            "warn",
            "No sign of life for a while",
            "Its process is there, but has reported nothing for over a minute: the machine may be overloaded or "
            "asleep, or the process stopped. It is not started a second time: it goes on by itself, or you cancel it.",
        )
    return told


def _told(job: Job) -> str:
    told_already = "resume" in f"{job.reason} {advice(job.outcome) if job.outcome else ''}".lower()
    retry = "" if job.deleted_at or told_already else RETRY
    if job.state == "failed":
        reason = (job.reason or "No reason was recorded; see the log").rstrip(".") + "."
        single = job.artefact and len(results_of(job.result)) < 2
        kept = f" The quantized model was saved before and stays in {job.artefact}." if single else ""
        hint = advice(job.outcome) if job.outcome else ""
        return notice("error", "This job failed", "\n".join(part for part in (reason + kept, hint, retry) if part))
    if job.state == "succeeded" and job.reason:
        return notice("info", "Finished as far as this machine can", job.reason)
    if job.state == "queued":
        return notice("info", "This job waits", job.reason or "It starts as soon as what it needs is free.")
    if job.state == "starting":
        return notice("info", "This job starts", "It has what it needs; its process is being started.")
    if job.state == "lost":
        text = "Its process is gone. It goes on in a new one where it stopped, as long as it has attempts left."
        why = f"{job.reason.rstrip('.')}. " if job.reason else ""
        return notice("warn", "This job has lost its process", why + text)
    if job.state == "cancelling":
        return notice("info", "This job is being cancelled", rung(job)[:1].upper() + rung(job)[1:])
    if job.state == "cancelled":
        hint = advice(job.outcome) if job.outcome and job.outcome != "cancelled" else ""
        return notice("warn", "This job was cancelled", "\n".join(part for part in (job.reason, hint, retry) if part))
    return ""


def history_table(events: Sequence[Row]) -> str:
    """The job's changes of state, newest first: when, in which attempt, to what, by whom, why.

    Args:
        events: Rows of `job_events`, oldest first.
    """
    if not events:
        return ""
    shown = list(reversed(events))[:MAX_HISTORY]
    body = "".join(
        f'<tr><td class="qd-nowrap">{esc(clock(row["at"]))}</td><td class="qd-num">{esc(row["attempt"])}</td>'
        f"<td>{badge(str(row['to_state']))}</td><td>{esc(row['actor'])}</td>"
        f"<td>{esc(str(row['reason'] or '')[:1000])}</td></tr>"
        for row in shown
    )
    older = len(events) - len(shown)
    below = f'<p class="qd-muted qd-small qd-below">{older} earlier changes are not shown.</p>' if older else ""
    head = '<th>When</th><th class="qd-num">Attempt</th><th>State</th><th>By</th><th>Why</th>'
    heading = '<div class="qd-section"><h2>History</h2></div>'
    return heading + card(
        '<div class="qd-scroll"><table class="qd-table qd-history qd-flow"><thead><tr>'
        f"{head}</tr></thead><tbody>{body}</tbody></table></div>{below}",
        classes="qd-flush",
    )
