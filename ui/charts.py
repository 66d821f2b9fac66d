"""The plotly figures. Colours of text, grid and axes come from `style.css`, so they follow light and dark.

Only attributes that plotly.js 3.3.1 knows are used: that is the version Gradio ships, whatever plotly.py says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

BASELINE = "#6b788a"
QUANTIZED = "#178a82"
RTN = "#c98a2b"
CLEAR = "rgba(0,0,0,0)"
GREY = "#7f8b9b"

Row = Mapping[str, Any]


def _layout(figure: go.Figure, heading: str, y_title: str, height: int) -> go.Figure:
    figure.update_layout(
        title={"text": heading, "font": {"size": 15}, "x": 0.01, "xanchor": "left", "y": 0.965, "yanchor": "top"},
        height=height,
        margin={"l": 56, "r": 16, "t": 66, "b": 44},
        paper_bgcolor=CLEAR,
        plot_bgcolor=CLEAR,
        font={"color": GREY, "size": 12.5},
        legend={"orientation": "h", "x": 0, "y": 1.0, "xanchor": "left", "yanchor": "bottom", "bgcolor": CLEAR},
        bargroupgap=0.08,
        hovermode="x unified" if height > 320 else "closest",
        uirevision="keep",
    )
    figure.update_xaxes(showgrid=False, zeroline=False, linecolor=GREY)
    figure.update_yaxes(title={"text": y_title, "standoff": 8}, zeroline=True, rangemode="tozero")
    return figure


def layer_errors(rows: Sequence[Row]) -> go.Figure:
    """Output error of each decoder layer: AWQ against plain rounding to nearest.

    Args:
        rows: `layer`, `error`, `rtn_error` (relative, 0 to 1) in the order of the layers.
    """
    number = [
        int(str(row["layer"]).rsplit(".", 1)[-1]) if str(row["layer"])[-1:].isdigit() else i
        for i, row in enumerate(rows)
    ]
    figure = go.Figure()
    series = (("Round to nearest", "rtn_error", RTN, "dot"), ("This job", "error", QUANTIZED, "solid"))
    for name, key, color, dash in series:
        figure.add_scatter(
            x=number,
            y=[100 * float(row[key]) for row in rows],
            name=name,
            mode="lines+markers",
            line={"color": color, "width": 2.2, "dash": dash},
            marker={"size": 7, "color": color},
            hovertemplate="%{y:.3g} %",
        )
    _layout(figure, "Output error by layer", "relative error (%)", 340)
    figure.update_layout(hovermode="x unified")
    figure.update_xaxes(title={"text": "decoder layer"}, dtick=max(1, len(number) // 16 or 1), tick0=0)
    return figure


def comparison(heading: str, y_title: str, rows: Sequence[tuple[str, Row]]) -> go.Figure:
    """Baseline beside quantized for each job, all of one metric and one protocol.

    The error bars are the 95 % interval of the difference (paired, same samples), drawn on the quantized bar.

    Args:
        heading: Title of the chart.
        y_title: Axis title with the unit.
        rows: (job label, comparison row) in the order of the jobs.
    """
    labels = [_wrapped(label) for label, _ in rows]
    figure = go.Figure()
    for name, key, color in (("Baseline", "baseline", BASELINE), ("Quantized", "quantized", QUANTIZED)):
        values = [float(row[key]) for _, row in rows]
        figure.add_bar(
            x=labels,
            y=values,
            name=name,
            marker={"color": color, "line": {"width": 0}},
            text=[f"{v:.4g}" for v in values],
            textposition="inside",
            insidetextanchor="middle",
            textfont={"color": "#ffffff", "size": 12.5},
            hovertemplate="%{y:.5g}",
            error_y=_error_bars([row for _, row in rows]) if key == "quantized" else None,
        )
    _layout(figure, heading, y_title, 320)
    return figure.update_layout(bargap=max(0.3, 0.7 - 0.2 * len(rows)))


def _error_bars(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not any(row.get("interval") for row in rows):
        return None
    intervals = [row.get("interval") or (row["impact"], row["impact"]) for row in rows]
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(0.0, high - row["impact"]) for row, (_, high) in zip(rows, intervals, strict=True)],
        "arrayminus": [max(0.0, row["impact"] - low) for row, (low, _) in zip(rows, intervals, strict=True)],
        "thickness": 1.4,
        "width": 5,
        "color": GREY,
    }


def _wrapped(label: str) -> str:
    """A long job name on two lines, so that names do not overlap below the bars."""
    if len(label) <= 18:
        return label
    middle = len(label) // 2
    return label[:middle] + "<br>" + label[middle:]
