"""How one job looks: badge, headline, stages, result table, artefact. All functions return HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backend.evaluate.report import format_values
from backend.evaluate.report import title as metric_title
from backend.jobs.store import Job
from ui.format import ago, duration, elapsed, moment, significant, size
from ui.layout import action, card, esc, facts, link, notice

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


def value_text(row: Row, value: float) -> str:
    """A number in a row's unit, e.g. `7.32`, `60.66 %`, `83.4 tokens/s`.

    It gets as many decimals as make the row's impact visible, the same as in the command line's table.
    """
    return f"{value:.{_decimals(row)}f} {row.get('unit') or ''}".strip()


def _decimals(row: Row) -> int:
    return len(format_values(dict(row))[0].partition(".")[2])


def _difference(row: Row, value: float) -> str:
    """A signed difference; differences of percentages are points."""
    unit = {"%": "points"}.get(str(row.get("unit") or ""), row.get("unit") or "")
    sign = "+" if value > 0 else ""
    return f"{sign}{value:.{_decimals(row)}f} {unit}".strip()


def impact_text(row: Row) -> str:
    """The signed difference quantized minus baseline, in the row's unit."""
    return _difference(row, row["impact"])


def impact_class(row: Row) -> str:
    """CSS class of an impact: better, worse, or neither.

    A measured number is only called better or worse if its interval excludes zero; sizes have no noise.
    """
    impact, interval = row["impact"], row.get("interval")
    certain = row["metric"] == "size" if not interval else not interval[0] <= 0 <= interval[1]
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


def result_table(job: Job) -> str:
    """The guide's table: Model, Task, Metric, Baseline, Quantized, Impact."""
    body = "".join(
        f"<tr><td>{esc(job.model)}</td>"
        f'<td>{esc(row["name"])}<span class="qd-sub">{esc(row["protocol"])}</span></td>'
        f'<td class="qd-nowrap">{esc(metric_words(row))}</td>'
        f"{number_cells(row)}</tr>"
        for row in rows_of(job)
    )
    return (
        '<div class="qd-scroll"><table class="qd-table" id="result-table"><thead><tr><th>Model</th><th>Task</th>'
        '<th>Metric</th><th class="qd-num">Baseline</th><th class="qd-num">Quantized</th>'
        f'<th class="qd-num">Impact</th></tr></thead><tbody>{body}</tbody></table></div>'
    )


def metric_words(row: Row) -> str:
    """The metric with an arrow in the direction of improvement."""
    return f"{metric_title(dict(row))} {'↑' if row['higher_is_better'] else '↓'}"


def headline(job: Job) -> str:
    """The result in a few words: perplexity change and size ratio; else why there is none."""
    rows = rows_of(job)
    parts = []
    perplexity = next((r for r in rows if r["metric"] == "perplexity"), None)
    if perplexity:
        shown = f"perplexity {impact_text(perplexity)}"
        parts.append(f'<span class="{impact_class(perplexity)}">{esc(shown)}</span>')
    sizes = next((r for r in rows if r["metric"] == "size" and r.get("baseline")), None)
    if sizes:
        parts.append(f"{significant(100 * sizes['quantized'] / sizes['baseline'])} % of the size")
    if parts:
        return ", ".join(parts)
    if job.reason:
        short = job.reason if len(job.reason) <= 90 else job.reason[:87] + "..."
        return f'<span class="qd-muted" title="{esc(job.reason)}">{esc(short)}</span>'
    return ""


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
    buttons.append(link("Clone", f"/new?clone={job.uid}", title="Open the same settings as a new job"))
    buttons.append(
        link("YAML", f"/download/{job.uid}.yaml", title="Download the job file", download=f"{job.job_id}.yaml")
    )
    if job.state in ("queued", "running"):
        ask = f"Cancel job {job.job_id}? What it has computed so far is lost."
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
        ("Run time", run_time(job)),
        ("Peak memory", size((job.result or {}).get("peak_rss_bytes"))),
    ]
    return f'<div class="qd-stack">{_reason(job)}{card(facts([row for row in rows if row[1] != "-"]))}</div>'


def _reason(job: Job) -> str:
    if job.state == "failed":
        kept = f" The quantized model was saved before and stays in {job.artefact}." if job.artefact else ""
        return notice("error", "This job failed", f"{job.reason or 'No reason was recorded; see the log.'}{kept}")
    if job.state == "queued" and job.reason:
        return notice("info", "This job waits", job.reason)
    if job.state == "cancelled":
        return notice("warn", "This job was cancelled", job.reason or "")
    return ""


def artefact(job: Job, files: Sequence[tuple[str, int]]) -> str:
    """Where the quantized model is, its files, and how to load it.

    Args:
        job: A job with an artefact.
        files: Name and bytes of every file in it.
    """
    listed = "".join(
        f'<tr><td class="qd-mono">{esc(name)}</td><td class="qd-num">{size(n_bytes)}</td></tr>'
        for name, n_bytes in files
    )
    code = (
        "from backend.formats.loader import load_model, load_tokenizer\n\n"
        f"model = load_model({job.artefact!r})\ntokenizer = load_tokenizer({job.artefact!r})"
    )
    serve = f"vllm serve {job.artefact} --quantization awq"
    return card(
        f'<p class="qd-mono qd-small">{esc(job.artefact)}</p>'
        '<div class="qd-scroll"><table class="qd-table"><thead><tr><th>File</th><th class="qd-num">Size</th></tr>'
        f"</thead><tbody>{listed}</tbody></table></div>"
        f'<h2 style="margin-top:18px">Load it</h2><pre class="qd-log">{esc(code)}</pre>'
        f'<p class="qd-muted qd-small">On a machine with vLLM and a GPU (AutoAWQ format): '
        f"<code>{esc(serve)}</code></p>",
        "Quantized model",
    )
