"""The texts of a draft on the New job page: their first rows as the model sees them, and how long rows are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
import plotly.graph_objects as go

from backend.errors import ConfigErrors, QuantdeckError
from backend.paths import Home
from backend.sources.calibration import Purpose
from backend.sources.preview import NotDownloadedError, Preview, ShownRow, bins_of, preview, preview_config, summary
from ui.charts import CLEAR, GREY, QUANTIZED
from ui.draft import Draft, merge
from ui.layout import esc, notice

ROWS = 5
BINS = 40
HEIGHT = 240  # pixels

HINT = (
    '<p class="qd-muted qd-small">Reads about as many rows as the job will, and shows the first of them as the model '
    "gets them: after the format string or chat template, with the tokens that the tokenizer adds.</p>"
)
NO_TEXT = (
    "No text chosen yet",
    "Choose the built-in demo text or a dataset of the Hub above, or give a file under Local data.",
)
NOT_HERE = (
    "This dataset is not on this machine",
    "The job downloads all of it. A preview can fetch its first rows alone; how large they are is only known then.",
)


TITLES: dict[Purpose, str] = {
    "calibration": "Preview: what the model will read",
    "tuning": "Preview: what tuning will read",
}


class DataPreview:
    """The folded part with its button; laid out where it is made.

    Args:
        text: Which text of the job it shows.
    """

    def __init__(self, text: Purpose = "calibration") -> None:
        self._text = text
        name = "preview" if text == "calibration" else f"{text}-preview"
        whole = "data-preview" if text == "calibration" else name
        with gr.Accordion(TITLES[text], open=False, elem_id=whole):
            self._button = gr.Button("Preview", elem_id=f"{name}-show", size="sm")
            self._fetch = gr.Button("Fetch its first rows", elem_id=f"{name}-fetch", size="sm", visible=False)
            self._shown = gr.HTML(HINT, elem_id=f"{name}-rows")
            self._chart = gr.Plot(visible=False, show_label=False, elem_id=f"{name}-lengths")

    def connect(self, home: Home, draft: gr.State, controls: Sequence[Any]) -> None:
        """Let the buttons show the text of the form as it is now."""

        def on_preview(now: Draft, *values: Any) -> list[Any]:
            return answer(home, now, values, self._text, online=False)

        def on_fetch(now: Draft, *values: Any) -> list[Any]:
            return answer(home, now, values, self._text, online=True)

        for button, handler in ((self._button, on_preview), (self._fetch, on_fetch)):
            button.click(
                handler, [draft, *controls], [self._shown, self._chart, self._fetch],
                concurrency_id="preview", concurrency_limit=2, trigger_mode="once", show_progress="minimal",
                show_progress_on=[self._shown], api_visibility="private",
            )  # fmt: skip


def answer(
    home: Home, draft: Draft, values: Sequence[Any], text: Purpose = "calibration", *, online: bool
) -> list[Any]:
    """What the part shows: text, chart, and whether rows of a Hub dataset can be fetched."""
    try:
        document = merge(draft, values)
        if not any(document.values.get(key) for key in ("DATASET_NAME", "DATA_PATH")):
            return _said(notice("info", *NO_TEXT))
        config = preview_config(document, text)
        found = preview(config, home, text=text, rows=ROWS, online=online, confined=True)
    except NotDownloadedError:
        return _said(notice("info", *NOT_HERE), fetch=True)
    except ConfigErrors as error:
        told = "\n".join(item.message for item in error.errors)
        return _said(notice("error", "The text cannot be read as it is set", told))
    except QuantdeckError as error:
        return _said(notice("error", "The text cannot be read", error.message))
    chart = gr.Plot(value=length_chart(found), visible=True) if found.lengths else gr.Plot(visible=False)
    return [gr.HTML(preview_html(found)), chart, gr.Button(visible=False)]


def _said(html: str, *, fetch: bool = False) -> list[Any]:
    return [gr.HTML(html), gr.Plot(visible=False), gr.Button(visible=fetch)]


def preview_html(found: Preview) -> str:
    """Warnings, the summary, the rows, and notes below."""
    parts = []
    if found.warnings:
        items = "".join(f"<li>{esc(text)}</li>" for text in found.warnings)
        parts.append(
            f'<div class="qd-notice qd-warn" role="status"><strong>Look at this first</strong><ul>{items}</ul></div>'
        )
    parts.append(f'<p class="qd-small">{esc(summary(found))}</p>')
    parts += [_row_html(row, found.unit) for row in found.rows]
    if found.notes:
        parts.append("".join(f'<p class="qd-muted qd-small">{esc(text)}</p>' for text in found.notes))
    return f'<div class="qd-stack qd-preview">{"".join(parts)}</div>'


def _row_html(row: ShownRow, unit: str) -> str:
    length = f"{row.length:,} {unit}" if row.length else "empty, skipped"
    said = [f"Row {row.number}", length, *(["by the chat template"] if row.templated else [])]
    if row.cut:
        said.append("only its beginning is shown")
    head = f'<p class="qd-muted qd-small">{esc(" · ".join(said))}</p>'
    if not row.length:
        return f"<div>{head}</div>"
    body = "".join(
        f'<span class="qd-token" title="special token">{esc(text)}</span>' if special else esc(text)
        for text, special in row.pieces
    )
    more = '<span class="qd-muted"> …</span>' if row.cut else ""
    label = f"Row {row.number} as the model sees it"
    return f'<div>{head}<pre class="qd-log" tabindex="0" aria-label="{esc(label)}">{body}{more}</pre></div>'


def length_chart(found: Preview) -> go.Figure:
    """How many rows are how long, with the length of a sequence where rows are cut there."""
    bins = bins_of(found.lengths, BINS)
    figure = go.Figure()
    figure.add_bar(
        x=[(first + last) / 2 for first, last, _ in bins],
        y=[n for *_, n in bins],
        width=[last - first + 1 for first, last, _ in bins],
        customdata=[f"{first:,} to {last:,}" if last > first else f"{first:,}" for first, last, _ in bins],
        marker={"color": QUANTIZED, "line": {"width": 1, "color": CLEAR}},
        hovertemplate="%{customdata} " + found.unit + ": %{y} rows<extra></extra>",
    )
    if found.unit == "tokens" and found.packing != "join" and bins[0][0] <= found.length <= bins[-1][1]:
        figure.add_vline(x=found.length, line={"color": GREY, "dash": "dash", "width": 1.4})
    heading = {"text": "Lengths of rows", "font": {"size": 15}, "x": 0.01, "xanchor": "left", "y": 0.95}
    figure.update_layout(
        title=heading, height=HEIGHT, margin={"l": 48, "r": 12, "t": 44, "b": 40}, paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR, font={"color": GREY, "size": 12.5}, bargap=0.04, showlegend=False, hovermode="closest",
    )  # fmt: skip
    figure.update_xaxes(title={"text": f"{found.unit} per row"}, showgrid=False, zeroline=False, linecolor=GREY)
    return figure.update_yaxes(title={"text": "rows", "standoff": 8}, rangemode="tozero", zeroline=True)
