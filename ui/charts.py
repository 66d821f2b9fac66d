"""The plotly figures. Colours of text, grid and axes come from `style.css`, so they follow light and dark.

Only attributes that plotly.js 3.3.1 knows are used: that is the version Gradio ships, whatever plotly.py says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ui.pareto import Point, Tradeoff, front

BASELINE = "#6b788a"
QUANTIZED = "#178a82"
RTN = "#c98a2b"
SERIES = (QUANTIZED, "#7a5bc0", "#2f6fd0", "#b5487a", "#6f8a1f", "#c1602c", "#3f9bb0", "#8d6e53")
ROOM = 1.3  # of an axis whose labels stand on the right of their points
LEAST_DECADES = 0.8  # of a logarithmic axis: enough for two ticks of 1, 2 and 5
CLEAR = "rgba(0,0,0,0)"
GREY = "#7f8b9b"

Row = Mapping[str, Any]

_MIDDLE = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
_BARS = {"type": "data", "symmetric": False, "thickness": 1.4, "width": 5, "color": GREY}


def layout(figure: go.Figure, heading: str, y_title: str, height: int) -> go.Figure:
    """What all figures have in common: title, ground, type, legend and axes; zoom survives an update."""
    figure.update_layout(
        title={"text": heading, "font": {"size": 15}, "x": 0.01, "xanchor": "left", "y": 0.965, "yanchor": "top"},
        height=height,
        margin={"l": 56, "r": 16, "t": 74, "b": 44},
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


def layer_errors(rows: Sequence[Row], labels: Mapping[str, str] | None = None) -> go.Figure:
    """Error of each decoder layer: every configuration, and (dashed) what it is to be compared with.

    That is plain rounding to nearest, or the layer before its finetuning.

    Args:
        rows: `layer`, `error`, `rtn_error`, `before_error` (relative, 0 to 1; None where the engine does not know it),
            `unit` (of what), and `configuration` if there are several, in the order of the layers.
        labels: Names of the configurations for people.
    """
    figure = go.Figure()
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(str(row.get("configuration") or ""), []).append(row)
    drawn: list[list[float]] = []
    for i, (name, own) in enumerate(groups.items()):
        label = (labels or {}).get(name, name) or "This job"
        color = SERIES[i % len(SERIES)]
        nearest = [float(row["rtn_error"]) for row in own if row.get("rtn_error") is not None]
        if nearest and not any(_alike(nearest, other) for other in drawn):
            drawn.append(nearest)  # configurations of equal bits and groups share it
            several = len(groups) > 1
            title = f"Round to nearest, as {label}" if several else "Round to nearest"
            _layer_line(figure, own, "rtn_error", title, color if several else RTN, "dash")
        if any(row.get("before_error") not in (None, row["error"]) for row in own):
            _layer_line(figure, own, "before_error", "Before block finetuning", RTN, "dash")
        _layer_line(figure, own, "error", label, color, "solid")
    what = "Weight" if any("weight" in str(row.get("unit")) for row in rows) else "Output"
    layout(figure, f"{what} error by layer", "relative error (%)", 340 + 12 * max(1, len(groups)))
    if len(groups) > 1:
        figure.update_layout(legend={"orientation": "h", "x": 0, "y": -0.2, "yanchor": "top"}, margin={"b": 110})
        figure.update_layout(height=440 + 16 * len(groups))
        figure.update_yaxes(type="log", rangemode="normal", dtick="D2")  # 2 and 4 bits differ tenfold
    figure.update_layout(hovermode="x unified")
    if not rows:
        figure.add_annotation(text="A point per layer, from the first one on", showarrow=False, **_MIDDLE)
    most = max((len(own) for own in groups.values()), default=0)
    return figure.update_xaxes(title={"text": "decoder layer"}, dtick=max(1, most // 16), tick0=0)


def tuning_curve(rows: Sequence[Row]) -> go.Figure:
    """How the divergence from the base model falls while the whole model is tuned.

    Args:
        rows: `step`, `loss` (on the step's own text) and `validation` (None where it was not measured), nats per token.
    """
    figure = go.Figure()
    losses = [row for row in rows if row.get("loss") is not None]
    measured = [row for row in rows if row.get("validation") is not None]
    figure.add_scatter(
        x=[row["step"] for row in losses], y=[row["loss"] for row in losses], name="Training", mode="lines",
        line={"color": BASELINE, "width": 1.4}, hovertemplate="%{y:.3g}",
    )  # fmt: skip
    figure.add_scatter(
        x=[row["step"] for row in measured],
        y=[row["validation"] for row in measured],
        name="Validation",
        mode="lines+markers",
        line={"color": QUANTIZED, "width": 2.2},
        marker={"size": 7, "color": QUANTIZED},
        hovertemplate="%{y:.3g}",
    )
    if measured:
        best = min(measured, key=lambda row: float(row["validation"]))
        figure.add_scatter(
            x=[best["step"]],
            y=[best["validation"]],
            name="Best, kept",
            mode="markers",
            marker={"size": 13, "color": CLEAR, "line": {"color": QUANTIZED, "width": 2}},
            hovertemplate="%{y:.4g}",
        )
    layout(figure, "Tuning: divergence from the base model ↙", "nats/token", 352)
    return figure.update_xaxes(title={"text": "step"})


def _alike(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether two lines would lie on one another; the layers before are quantized differently, so not quite equal."""
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=0.03) for x, y in zip(a, b, strict=True))


def _layer_line(figure: go.Figure, rows: Sequence[Row], key: str, name: str, color: str, dash: str) -> None:
    number = [
        int(str(row["layer"]).rsplit(".", 1)[-1]) if str(row["layer"])[-1:].isdigit() else i
        for i, row in enumerate(rows)
    ]
    figure.add_scatter(
        x=number,
        y=[None if row.get(key) is None else 100 * float(row[key]) for row in rows],
        name=name,
        mode="lines+markers",
        line={"color": color, "width": 2.2, "dash": dash},
        marker={"size": 7, "color": color},
        hovertemplate="%{y:.3g} %",
    )


def size_against(y_title: str, baseline: tuple[float, float], points: Sequence[tuple[str, float, float]]) -> go.Figure:
    """Size against a score, one point per configuration; nearest to the lower left corner is best.

    Args:
        y_title: Name of the score, where less is better.
        baseline: (MB, score) of the 16-bit model.
        points: (label, MB, score) of each configuration.
    """
    figure = go.Figure()
    named = (
        ("Baseline", [("Baseline", *baseline)], BASELINE, "diamond"),
        ("Quantized", list(points), QUANTIZED, "circle"),
    )
    for name, rows, color, symbol in named:
        figure.add_scatter(
            x=[row[1] for row in rows],
            y=[row[2] for row in rows],
            text=[row[0] for row in rows],
            name=name,
            mode="markers+text",
            textposition=_text_positions(rows, (baseline, *(p[1:] for p in points))),
            marker={"size": 11, "color": color, "symbol": symbol},
            hovertemplate="%{text}<br>%{x:.4g} MB<br>%{y:.5g}<extra></extra>",
            cliponaxis=False,
        )
    figure.add_hline(y=baseline[1], line={"color": BASELINE, "width": 1.2, "dash": "dot"})
    layout(figure, "Size against perplexity ↙", y_title, 380)
    figure.update_layout(hovermode="closest", showlegend=False)
    figure.update_xaxes(title={"text": "size of the weight files (MB)"}, rangemode="tozero", showgrid=True)
    return figure.update_yaxes(rangemode="normal", zeroline=False)


def cost_against_divergence(shown: Tradeoff) -> go.Figure:
    """What models take against their divergence from the base model; the line joins those that no other one beats."""
    points = shown.points
    figure, best = go.Figure(), front(points)
    figure.add_scatter(
        x=[p.cost for p in best],
        y=[p.divergence for p in best],
        name="Best for its size",
        mode="lines",
        line={"color": BASELINE, "width": 1.4, "dash": "dot"},
        hoverinfo="skip",
    )
    (low, high), right = _decades(points), ROOM * max(p.cost for p in points)
    rows = [(p.label, p.cost, math.log10(p.divergence)) for p in points]
    figure.add_scatter(
        x=[p.cost for p in points],
        y=[p.divergence for p in points],
        text=[p.label for p in points],
        name="Quantized",
        mode="markers+text",
        textposition=_text_positions(rows, [(0, low), (right, high)], edge=1.0),  # the line comes from the left
        marker={"size": 11, "color": QUANTIZED},
        error_y=_intervals(points),
        hovertemplate="%{text}<br>%{x:.4g}<br>%{y:.3g} nats/token<extra></extra>",
        cliponaxis=False,
    )
    layout(figure, f"KL divergence against {shown.axis.partition(' (')[0]} ↙", "nats/token", 380)
    figure.update_layout(hovermode="closest", showlegend=False)
    figure.update_xaxes(title={"text": shown.axis}, range=[0, right], showgrid=True)
    figure.update_yaxes(type="log", rangemode="normal", zeroline=False, range=[low, high], tickformat="~g")
    return figure.update_yaxes(dtick="D2" if high - low < 2.5 else 1)


def _decades(points: Sequence[Point]) -> tuple[float, float]:
    """Powers of ten that hold all points and their intervals; far enough apart for some ticks between them."""
    bounds = [bound for p in points for bound in (p.divergence, *(p.interval or ())) if bound > 0]
    low, high = math.log10(min(bounds)), math.log10(max(bounds))
    margin = max(0.06 * (high - low), (LEAST_DECADES - (high - low)) / 2)
    return low - margin, high + margin


def _intervals(points: Sequence[Point]) -> dict[str, Any] | None:
    if not any(p.interval for p in points):
        return None
    bounds = [p.interval or (p.divergence, p.divergence) for p in points]
    return {
        **_BARS,
        "width": 0,  # caps would make squares of the points
        "array": [high - p.divergence for p, (_, high) in zip(points, bounds, strict=True)],
        "arrayminus": [p.divergence - low for p, (low, _) in zip(points, bounds, strict=True)],
    }


def _text_positions(
    rows: Sequence[tuple[str, float, float]], everything: Sequence[tuple[float, ...]], *, edge: float = 0.7
) -> list[str]:
    """Where each label stands: beside its point, turned inwards near the right edge, stacked where points crowd."""
    widths = [max(values) - min(values) or 1.0 for values in zip(*everything, strict=True)]
    right = edge * max(x for x, _ in everything)
    placed: list[tuple[float, float]] = []
    positions = []
    for _, x, y in rows:
        near = sum(abs(x - a) < 0.12 * widths[0] and abs(y - b) < 0.06 * widths[1] for a, b in placed)
        placed.append((x, y))
        positions.append(("top", "bottom", "middle")[near % 3] + (" left" if x > right else " right"))
    return positions


def comparison(heading: str, y_title: str, rows: Sequence[tuple[str, Row]]) -> go.Figure:
    """Baseline beside quantized for each job, all of one metric and one protocol.

    Distances from the baseline stand alone: the baseline's own is nothing.

    The error bars are the 95 % interval of the difference (paired, same samples), drawn on the quantized bar.

    Args:
        heading: Title of the chart.
        y_title: Axis title with the unit.
        rows: (job label, comparison row) in the order of the jobs.
    """
    labels = [_wrapped(label) for label, _ in rows]
    figure = go.Figure()
    bars = (("Baseline", "baseline", BASELINE), ("Quantized", "quantized", QUANTIZED))
    bars = bars if any(row["baseline"] for _, row in rows) else bars[1:]
    for name, key, color in bars:
        values = [float(row[key]) for _, row in rows]
        figure.add_bar(
            x=labels,
            y=values,
            name=name,
            marker={"color": color, "line": {"width": 0}},
            text=[f"{v:.4g}" for v in values],
            textposition=["inside" if len(bars) == 2 or v > 0.15 * max(values) else "outside" for v in values],
            insidetextanchor="middle",
            insidetextfont={"color": "#ffffff", "size": 12.5},
            outsidetextfont={"color": GREY, "size": 12.5},
            hovertemplate="%{y:.5g}",
            error_y=_error_bars([row for _, row in rows]) if key == "quantized" else None,
        )
    layout(figure, heading, y_title, 320)
    return figure.update_layout(bargap=max(0.3, 0.7 - 0.2 * len(rows)))


def _error_bars(rows: Sequence[Row]) -> dict[str, Any] | None:
    if not any(row.get("interval") for row in rows):
        return None
    intervals = [row.get("interval") or (row["impact"], row["impact"]) for row in rows]
    return {
        **_BARS,
        "array": [max(0.0, high - row["impact"]) for row, (_, high) in zip(rows, intervals, strict=True)],
        "arrayminus": [max(0.0, row["impact"] - low) for row, (low, _) in zip(rows, intervals, strict=True)],
    }


def _wrapped(label: str) -> str:
    """A long job name on two lines, so that names do not overlap below the bars."""
    if len(label) <= 18:
        return label
    if " / " in label:
        return label.replace(" / ", " /<br>")
    middle = len(label) // 2
    return label[:middle] + "<br>" + label[middle:]
