"""Memory, processor cores and GPUs of a job, drawn over the time that it works; its stages as bands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import plotly.graph_objects as go

from backend.jobs.stage_names import index_of, shown_stages
from backend.jobs.usage import Sample, joined
from ui import charts
from ui.layout import esc

POINTS = 600  # of a line; more are not told apart
BAND = "rgba(127,139,155,0.13)"
NAMED = 0.2  # share of the width from which on a stage's name fits into its band, on a phone as well
UPPER, LOWER = (0.42, 1.0), (0.0, 0.3)


def on_one_axis(samples: Sequence[Sample]) -> list[Sample]:
    """The samples with `at` counted from the first attempt's beginning, without the waits between attempts."""
    found: list[Sample] = []
    before = 0.0
    for i, one in enumerate(samples):
        if i and one.attempt != samples[i - 1].attempt:
            before += samples[i - 1].at
        found.append(replace(one, at=before + one.at))
    return found


def usage_chart(samples: Sequence[Sample], algorithm: str) -> go.Figure:
    """Memory of the job and its GPUs above, processor cores and how busy the GPUs are below; stages as bands.

    Args:
        samples: Of all attempts.
        algorithm: Of the job; its stages have their names from it.
    """
    shown = on_one_axis(joined(samples, POINTS))
    scale, unit = _time_unit(shown[-1].at if shown else 0.0)
    x = [round(one.at / scale, 4) for one in shown]
    most = max((max(one.memory, *(g.used for g in one.gpus)) if one.gpus else one.memory for one in shown), default=0)
    byte, byte_unit = (1e9, "GB") if most >= 1e9 else (1e6, "MB")
    names = [stage_name(algorithm, one) for one in shown]
    figure = go.Figure()
    figure.add_scatter(
        x=x, y=[round(one.memory / byte, 4) for one in shown], name="Memory", customdata=names, mode="lines",
        fill="tozeroy", fillcolor="rgba(23,138,130,0.14)", line={"color": charts.QUANTIZED, "width": 2},
        hovertemplate=f"%{{y:.3~g}} {byte_unit}<br><i>%{{customdata}}</i>",
    )  # fmt: skip
    figure.add_scatter(
        x=x, y=[one.cores for one in shown], name="Cores", yaxis="y2", mode="lines", showlegend=False,
        line={"color": charts.SERIES[2], "width": 1.6}, hovertemplate="%{y:.3~g} in use",
    )  # fmt: skip
    charts.layout(figure, "Memory and processors", f"memory ({byte_unit})", 330)
    figure.update_layout(
        yaxis={"domain": UPPER},
        yaxis2={"domain": LOWER, "title": {"text": "cores", "standoff": 8}, "rangemode": "tozero", "nticks": 4},
        showlegend=False,
        hoversubplots="axis",
        uirevision=unit,  # a zoom into seconds means nothing once minutes are drawn
        shapes=_bands(x, names),
        annotations=_band_names(x, names),
    )
    _gpu_lines(figure, shown, x, byte, byte_unit)
    return figure.update_xaxes(title={"text": f"{unit} of work"}, anchor="y2", rangemode="tozero")


def _gpu_lines(figure: go.Figure, shown: Sequence[Sample], x: Sequence[float], byte: float, byte_unit: str) -> None:
    indices = sorted({gpu.index for one in shown for gpu in one.gpus})
    if indices:  # below: above are the names of the stages
        below = {"orientation": "h", "x": 0, "y": -0.28, "yanchor": "top"}
        figure.update_layout(showlegend=True, legend=below, height=392, margin={"b": 106})
    for i, index in enumerate(indices):
        uses = [next((gpu for gpu in one.gpus if gpu.index == index), None) for one in shown]
        line = {"color": charts.SERIES[(1, 3, 4, 5)[i % 4]], "width": 1.8}
        figure.add_scatter(
            x=x, y=[None if use is None else round(use.used / byte, 4) for use in uses], name=f"GPU {index} memory",
            mode="lines", line=line, hovertemplate=f"%{{y:.3~g}} {byte_unit}",
        )  # fmt: skip
        busy = [None if use is None else use.busy for use in uses]
        if any(value is not None for value in busy):
            figure.add_scatter(
                x=x, y=busy, name=f"GPU {index} busy", yaxis="y3", mode="lines", line={**line, "dash": "dot"},
                hovertemplate="%{y:.0f} %", showlegend=False,
            )  # fmt: skip
            figure.update_layout(
                yaxis3={
                    "overlaying": "y2", "side": "right", "range": [0, 100], "title": {"text": "GPU busy (%)"},
                    "showgrid": False, "nticks": 3,
                },
                margin={"r": 56},
            )  # fmt: skip


def _time_unit(seconds: float) -> tuple[float, str]:
    if seconds < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if seconds < 3 * 3600 else (3600.0, "hours")


def stage_name(algorithm: str, sample: Sample) -> str:
    """The stage of a sample as the list of stages calls it."""
    index = index_of(algorithm, sample.stage, sample.configuration)
    return shown_stages(algorithm)[index].label if index >= 0 else sample.stage or "Start"


@dataclass(frozen=True)
class _Band:
    name: str
    start: float
    end: float


def _stretches(x: Sequence[float], names: Sequence[str]) -> list[_Band]:
    found: list[_Band] = []
    for i, (at, name) in enumerate(zip(x, names, strict=True)):
        if found and found[-1].name == name:
            found[-1] = replace(found[-1], end=at)
        else:
            found.append(_Band(name, x[i - 1] if i else 0.0, at))
    return found


def _bands(x: Sequence[float], names: Sequence[str]) -> list[dict[str, Any]]:
    """Every second stage on a darker ground."""
    return [
        {
            "type": "rect", "xref": "x", "yref": "paper", "x0": band.start, "x1": band.end, "y0": 0, "y1": 1,
            "fillcolor": BAND, "line": {"width": 0}, "layer": "below",
        }
        for band in _stretches(x, names)[1::2]
    ]  # fmt: skip


def _band_names(x: Sequence[float], names: Sequence[str]) -> list[dict[str, Any]]:
    """The first word of each stage that took long; the whole name is told where the pointer is."""
    return [
        {
            "x": (band.start + band.end) / 2, "y": 1, "xref": "x", "yref": "paper", "yanchor": "bottom",
            "text": esc(band.name.split()[0]), "showarrow": False, "font": {"size": 11},
        }
        for band in _stretches(x, names)
        if band.end - band.start >= NAMED * (x[-1] or 1.0)
    ]  # fmt: skip
