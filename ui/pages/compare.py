"""Compare, `/compare?jobs=UID,UID`: baseline against quantized, job beside job, charts and a table.

A job of several configurations can be chosen as a whole (by its address) or by configuration (in the list).
A chart shows numbers of one protocol only. Where what was chosen was measured by several, one is picked in a list
above the charts, and whoever lacks it is left out and named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from backend.disk import BYTE_UNITS
from backend.errors import JobError
from backend.evaluate.published import CAPTION, TABLES, PublishedTable, origin, shown
from backend.jobs.results import full_name, measured
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.charts import comparison, cost_against_divergence
from ui.chat_pair import pair_key
from ui.format import ago
from ui.layout import card, empty, esc, link, page, plain, title
from ui.pareto import tradeoff
from ui.reading import briefly, find, store_notice
from ui.resultview import metric_words, number_cells

CHARTS = (
    ("perplexity", "Perplexity"), ("accuracy", "Accuracy"), ("KL divergence", "KL divergence"),
    ("bits per weight", "Bits per weight"), ("size", "Model size"), ("tokens/s", "Throughput"),
)  # fmt: skip
LISTED = 200  # newest finished jobs in the list; any job can be asked for by the address
MAX_ASKED = 50

Labelled = list[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Measured:
    """One configuration of a finished job.

    Attributes:
        key: Job and configuration, as in the list.
        label: For people.
        choice: The list's line.
        rows: Its comparison rows.
    """

    key: str
    label: str
    choice: str
    rows: list[Mapping[str, Any]]


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("compare"):
        gr.HTML(title("Compare", "Baseline beside quantized for each job. Lower is better for ↓, higher for ↑."))
        nothing = gr.HTML(visible=False, elem_id="compare-empty")
        chosen = gr.Dropdown(
            label="Jobs",
            info=f"The newest {LISTED} finished jobs that have measurements; a job of several configurations has a "
            "line for each.",
            multiselect=True,
            elem_id="compare-jobs",
            visible=False,
        )
        best = gr.Plot(show_label=False, visible=False, elem_id="chart-tradeoff", elem_classes=["qd-plot"])
        best_note = gr.HTML(visible=False)
        pickers, plots, notes = {}, {}, {}
        for pair in (CHARTS[:2], CHARTS[2:4], CHARTS[4:]):
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
        with gr.Accordion("Published reference figures", open=False, elem_id="compare-published"):
            gr.HTML(published_html())
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
    metrics = [metric for metric, _ in CHARTS]

    def pick(keys: list[str] | None) -> list[Measured]:
        wanted = [str(key) for key in keys or []]
        chosen = [one for one in asked_for(home, wanted) if one.key in wanted]
        return sorted(chosen, key=lambda one: one.key.partition("/")[0])  # oldest job first

    def on_load(request: gr.Request) -> list[Any]:
        asked = request.query_params.get("jobs", "").split(",")
        try:
            with briefly():
                found = measurements(home, also=asked)
        except JobError as error:
            return [gr.HTML(store_notice(error), visible=True), gr.skip()]
        if not found:
            text = "As soon as a job has finished with measurements, its numbers are drawn here beside its baseline's."
            return [
                gr.HTML(empty("Nothing to compare yet", text, link("New job", "/new", "primary")), visible=True),
                gr.skip(),
            ]
        chosen = [one.key for one in found if one.key in asked or one.key.partition("/")[0] in asked]
        newest = [one.key for one in found if one.key.partition("/")[0] == found[0].key.partition("/")[0]]
        choices = [(one.choice, one.key) for one in found]
        return [
            gr.HTML(visible=False),
            gr.Dropdown(choices=choices, value=chosen or newest, multiselect=True, visible=True),
        ]

    def on_jobs(keys: list[str] | None) -> list[Any]:
        try:
            with briefly():
                chosen = pick(keys)
        except JobError as error:
            return [*[gr.skip() for _ in everything[:-1]], store_notice(error)]
        lists, drawings = [], []
        for metric in metrics:
            protocols = protocols_of(chosen, metric)
            first = protocols[0] if protocols else None
            lists.append(gr.Dropdown(choices=protocols, value=first, visible=len(protocols) > 1))
            drawings += draw(chosen, metric, first)
        return [*draw_best(chosen), *lists, *drawings, delta_table(chosen)]

    def draw_best(chosen: list[Measured]) -> list[Any]:
        found = tradeoff([(one.label, one.rows) for one in chosen])
        if found is None:
            return [gr.Plot(visible=False), gr.HTML(visible=False)]
        note = note_html([found.protocol, *left_out(len(chosen) - len(found.points))])
        return [gr.Plot(cost_against_divergence(found), visible=True), gr.HTML(note, visible=True)]

    def draw(chosen: list[Measured], metric: str, protocol: str | None) -> list[Any]:
        rows = rows_for(chosen, metric, protocol)
        if not rows:
            said = card(f'<p class="qd-muted">No chosen job has measured {esc(metric)}.</p>') if chosen else ""
            return [gr.Plot(visible=False), gr.HTML(said, visible=bool(said))]
        note = chart_note(rows, missing=len(chosen) - len(rows), several=len(protocols_of(chosen, metric)) > 1)
        return [gr.Plot(figure_for(metric, rows), visible=True), gr.HTML(note, visible=bool(note))]

    drawn = [part for metric in metrics for part in (plots[metric], notes[metric])]
    everything = [best, best_note, *(pickers[m] for m in metrics), *drawn, table]
    demo.load(on_load, None, [nothing, chosen], **quiet).then(on_jobs, [chosen], everything, **quiet)
    chosen.input(on_jobs, [chosen], everything, **quiet)
    for metric in metrics:
        picker = pickers[metric]

        def redraw(keys: list[str] | None, protocol: str | None, metric: str = metric) -> list[Any]:
            try:
                with briefly():
                    return draw(pick(keys), metric, protocol)
            except JobError as error:
                return [gr.skip(), gr.HTML(store_notice(error), visible=True)]

        picker.input(redraw, [chosen, picker], [plots[metric], notes[metric]], **quiet)


def measurements(home: Home, also: Sequence[str] = ()) -> list[Measured]:
    """What can be compared: newest job first, a job's configurations in their order.

    Args:
        home: The home.
        also: Jobs that are asked for by uid although newer ones fill the list.
    """
    jobs = {job.uid: job for job in JobStore(home).jobs(states=("succeeded", "failed"), limit=LISTED)}
    for uid in dict.fromkeys(key.partition("/")[0] for key in also[:MAX_ASKED]):
        if uid not in jobs and (job := find(home, uid)):
            jobs[job.uid] = job
    return [one for uid in sorted(jobs, reverse=True) for one in _of(jobs[uid])]


def asked_for(home: Home, keys: Sequence[str]) -> list[Measured]:
    """The configurations of the jobs that some keys of the list stand for; what is gone is left out."""
    uids = dict.fromkeys(key.partition("/")[0] for key in keys[:MAX_ASKED])
    return [one for uid in uids if (job := find(home, uid)) for one in _of(job)]


def _of(job: Job) -> list[Measured]:
    found = []
    for entry in measured(job.result):
        label = plain(full_name(job, entry))
        choice = f"{label}, {plain(job.model)}, {ago(job.created_at)}"
        found.append(Measured(pair_key(job, entry["name"]), label, choice, entry["rows"]))
    return found


def protocol_of(row: Mapping[str, Any]) -> str:
    """What must be equal before two numbers share an axis: name and protocol."""
    return f"{row['name']} · {row['protocol']}"


def protocols_of(chosen: Sequence[Measured], metric: str) -> list[str]:
    """The protocols in which the chosen ones measured a metric; the most shared first, decode before prefill."""
    found: dict[str, int] = {}
    for one in chosen:
        for row in one.rows:
            if row["metric"] == metric:
                found[protocol_of(row)] = found.get(protocol_of(row), 0) + 1
    return sorted(found, key=lambda name: (-found[name], "prefill" in name.lower()))


def rows_for(chosen: Sequence[Measured], metric: str, protocol: str | None) -> Labelled:
    """Everybody's row of one metric and protocol, in the order of the list; those without it are left out."""
    return [
        (one.label, row)
        for one in chosen
        for row in one.rows
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
    return note_html([*parts, *left_out(missing)])


def left_out(missing: int) -> list[str]:
    """How many of the chosen ones a chart does not show, in words; nothing if it shows all."""
    if missing < 1:
        return []
    return [f"{missing} chosen {'job was' if missing == 1 else 'jobs were'} not measured this way and not drawn."]


def note_html(parts: Sequence[str]) -> str:
    """What stands below a chart."""
    return '<p class="qd-muted qd-small" style="margin:0 4px">' + "<br>".join(esc(part) for part in parts) + "</p>"


def delta_table(chosen: Sequence[Measured]) -> str:
    """All numbers of the chosen jobs and configurations; rows of one metric and protocol stand together."""
    if not chosen:
        return ""
    body = []
    keys = list(dict.fromkeys((row["metric"], protocol_of(row)) for one in chosen for row in one.rows))
    for metric, protocol in keys:
        rows = rows_for(chosen, metric, protocol)
        first = rows[0][1]
        shared = (
            f'<td rowspan="{len(rows)}" class="qd-nowrap">{esc(metric_words(first))}</td><td rowspan="{len(rows)}">'
            f'{esc(first["name"])}<span class="qd-sub">{esc(first["protocol"])}</span></td>'
        )
        for i, (label, row) in enumerate(rows):
            named = f'<td class="qd-nowrap">{esc(label)}</td>'
            body.append(f"<tr>{'' if i else shared}{named}{number_cells(row)}</tr>")
    return card(
        '<div class="qd-scroll"><table class="qd-table qd-numbers qd-flow"><thead><tr><th>Metric</th>'
        '<th>Measured how</th><th>Job</th><th class="qd-num">Baseline</th><th class="qd-num">Quantized</th>'
        f'<th class="qd-num">Impact</th></tr></thead><tbody>{"".join(body)}</tbody></table></div>',
        classes="qd-flush",
    )


def published_html() -> str:
    """The figures of others, each table with where it comes from; they share no table and no chart with ours."""
    return f'<p class="qd-muted">{esc(CAPTION)}</p>' + "".join(_published(table) for table in TABLES)


def _published(table: PublishedTable) -> str:
    heads = "".join(f'<th class="qd-num">{esc(column.heading)}</th>' for column in table.columns)
    body = []
    for row in table.rows:
        numbers = "".join(f'<td class="qd-num">{esc(shown(value))}</td>' for value in row.values)
        body.append(f'<tr><td class="qd-nowrap">{esc(row.runtime)}</td><td>{esc(row.label)}</td>{numbers}</tr>')
    return card(
        f'<div class="qd-scroll"><table class="qd-table"><thead><tr><th>Runtime</th><th>Quantized</th>{heads}</tr>'
        f"</thead><tbody>{''.join(body)}</tbody></table></div>{note_html([origin(table)])}",
        table.heading,
    )
