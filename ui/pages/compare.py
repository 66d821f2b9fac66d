"""Compare, `/compare?jobs=UID,UID`: baseline against quantized, job beside job, four charts and a table.

A chart shows numbers of one protocol only. Where the chosen jobs were measured by several, one is picked in a
list above the charts, and the jobs that lack it are left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr

from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.charts import comparison
from ui.format import ago
from ui.jobview import metric_words, number_cells, rows_of
from ui.layout import card, empty, esc, link, page, title

CHARTS = (("perplexity", "Perplexity"), ("accuracy", "Accuracy"), ("size", "Model size"), ("tokens/s", "Throughput"))
BYTE_UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3, "bytes": 1.0}

Labelled = list[tuple[str, Mapping[str, Any]]]


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("compare"):
        gr.HTML(title("Compare", "Baseline beside quantized for each job. Lower is better for ↓, higher for ↑."))
        nothing = gr.HTML(visible=False, elem_id="compare-empty")
        chosen = gr.Dropdown(
            label="Jobs",
            info="Jobs that finished with measurements.",
            multiselect=True,
            elem_id="compare-jobs",
            visible=False,
        )
        pickers, plots, notes = {}, {}, {}
        for pair in (CHARTS[:2], CHARTS[2:]):
            with gr.Row(elem_classes=["qd-split"]):
                for metric, name in pair:
                    with gr.Column(min_width=380):
                        word = name.split()[-1].lower()
                        plots[metric] = gr.Plot(
                            show_label=False, visible=False, elem_id=f"chart-{word}", elem_classes=["qd-plot"]
                        )
                        pickers[metric] = gr.Dropdown(
                            label="Measured how",
                            info="There are numbers of several protocols; one is drawn at a time.",
                            visible=False, elem_id=f"protocol-{word}", elem_classes=["qd-picker"],
                        )  # fmt: skip
                        notes[metric] = gr.HTML(visible=False)
        table = gr.HTML(elem_id="compare-table")
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    metrics = [metric for metric, _ in CHARTS]

    def finished() -> list[Job]:
        return [job for job in JobStore(home).jobs(states=("succeeded",)) if rows_of(job)]

    def pick(uids: list[str]) -> list[Job]:
        return [job for job in finished() if job.uid in uids]

    def on_load(request: gr.Request) -> list[Any]:
        jobs = finished()
        if not jobs:
            text = "As soon as a job has finished with measurements, its numbers are drawn here beside its baseline's."
            return [
                gr.HTML(empty("Nothing to compare yet", text, link("New job", "/new", "primary")), visible=True),
                gr.skip(),
            ]
        asked = [uid for uid in request.query_params.get("jobs", "").split(",") if uid in {job.uid for job in jobs}]
        choices = [(f"{job.job_id}, {job.model}, {ago(job.created_at)}", job.uid) for job in jobs]
        return [gr.HTML(visible=False), gr.Dropdown(choices=choices, value=asked or [jobs[0].uid], visible=True)]

    def on_jobs(uids: list[str] | None) -> list[Any]:
        jobs = pick(uids or [])
        lists, drawings = [], []
        for metric in metrics:
            protocols = protocols_of(jobs, metric)
            first = protocols[0] if protocols else None
            lists.append(gr.Dropdown(choices=protocols, value=first, visible=len(protocols) > 1))
            drawings += draw(uids, metric, first)
        return [*lists, *drawings, delta_table(jobs)]

    def draw(uids: list[str] | None, metric: str, protocol: str | None) -> list[Any]:
        jobs = pick(uids or [])
        rows = rows_for(jobs, metric, protocol)
        if not rows:
            said = card(f'<p class="qd-muted">No chosen job has measured {esc(metric)}.</p>') if jobs else ""
            return [gr.Plot(visible=False), gr.HTML(said, visible=bool(said))]
        note = chart_note(rows, missing=len(jobs) - len(rows), several=len(protocols_of(jobs, metric)) > 1)
        return [gr.Plot(figure_for(metric, rows), visible=True), gr.HTML(note, visible=bool(note))]

    drawn = [part for metric in metrics for part in (plots[metric], notes[metric])]
    everything = [*(pickers[m] for m in metrics), *drawn, table]
    demo.load(on_load, None, [nothing, chosen], **quiet).then(on_jobs, [chosen], everything, **quiet)
    chosen.input(on_jobs, [chosen], everything, **quiet)
    for metric in metrics:
        picker = pickers[metric]

        def redraw(uids: list[str] | None, protocol: str | None, metric: str = metric) -> list[Any]:
            return draw(uids, metric, protocol)

        picker.input(redraw, [chosen, picker], [plots[metric], notes[metric]], **quiet)


def protocol_of(row: Mapping[str, Any]) -> str:
    """What must be equal before two numbers share an axis: name and protocol."""
    return f"{row['name']} · {row['protocol']}"


def protocols_of(jobs: Sequence[Job], metric: str) -> list[str]:
    """The protocols in which the jobs measured a metric; those that most jobs share first, decode before prefill."""
    found: dict[str, int] = {}
    for job in jobs:
        for row in rows_of(job):
            if row["metric"] == metric:
                found[protocol_of(row)] = found.get(protocol_of(row), 0) + 1
    return sorted(found, key=lambda name: (-found[name], "prefill" in name.lower()))


def rows_for(jobs: Sequence[Job], metric: str, protocol: str | None) -> Labelled:
    """Each job's row of one metric and protocol, oldest job first; jobs without it are left out."""
    return [
        (job.job_id, row)
        for job in reversed(jobs)
        for row in rows_of(job)
        if row["metric"] == metric and protocol_of(row) == protocol
    ]


def figure_for(metric: str, rows: Labelled) -> Any:
    """The chart of one metric; sizes of different jobs may come in MB and in GB and are drawn in one of them."""
    heading = f"{dict(CHARTS)[metric]} {'↑' if rows[0][1]['higher_is_better'] else '↓'}"
    units = {str(row["unit"]) for _, row in rows}
    if units <= BYTE_UNITS.keys():
        unit = max(units, key=BYTE_UNITS.__getitem__)
        rows = [(label, _scaled(row, BYTE_UNITS[str(row["unit"])] / BYTE_UNITS[unit])) for label, row in rows]
        return comparison(heading, unit, rows)
    return comparison(heading, str(rows[0][1]["unit"] or metric), rows)


def _scaled(row: Mapping[str, Any], factor: float) -> dict[str, Any]:
    interval = row.get("interval")
    numbers = {key: row[key] * factor for key in ("baseline", "quantized", "impact")}
    return {**row, **numbers, "interval": [bound * factor for bound in interval] if interval else None}


def chart_note(rows: Labelled, missing: int, several: bool) -> str:
    """The chart's protocol (where the list does not tell it), its error bars, and how many jobs it leaves out."""
    parts = [] if several else [protocol_of(rows[0][1])]
    if any(row.get("interval") for _, row in rows):
        parts.append("Error bars: 95 % interval of the difference to the baseline on the same samples.")
    if missing > 0:
        parts.append(
            f"{missing} chosen {'job was' if missing == 1 else 'jobs were'} not measured this way and not drawn."
        )
    return '<p class="qd-muted qd-small" style="margin:0 4px">' + "<br>".join(esc(part) for part in parts) + "</p>"


def delta_table(jobs: Sequence[Job]) -> str:
    """All numbers of the chosen jobs; rows of one metric and protocol stand together."""
    if not jobs:
        return ""
    body = []
    keys = list(dict.fromkeys((row["metric"], protocol_of(row)) for job in jobs for row in rows_of(job)))
    for metric, protocol in keys:
        rows = rows_for(jobs, metric, protocol)
        first = rows[0][1]
        shared = (
            f'<td rowspan="{len(rows)}" class="qd-nowrap">{esc(metric_words(first))}</td><td rowspan="{len(rows)}">'
            f'{esc(first["name"])}<span class="qd-sub">{esc(first["protocol"])}</span></td>'
        )
        for i, (label, row) in enumerate(rows):
            named = f'<td class="qd-nowrap">{esc(label)}</td>'
            body.append(f"<tr>{'' if i else shared}{named}{number_cells(row)}</tr>")
    return card(
        '<div class="qd-scroll"><table class="qd-table"><thead><tr><th>Metric</th><th>Measured how</th><th>Job</th>'
        '<th class="qd-num">Baseline</th><th class="qd-num">Quantized</th><th class="qd-num">Impact</th></tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>",
        classes="qd-flush",
    )
