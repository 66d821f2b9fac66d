"""The figures hold plain numbers and transparent grounds, and can be sent to the browser."""

from __future__ import annotations

import json

import pytest

from ui.charts import comparison, layer_errors, size_against
from ui.format import ago, count, duration, size


def test_layer_chart_shows_both_methods_in_percent():
    rows = [{"layer": f"model.layers.{i}", "error": 0.004, "rtn_error": 0.011} for i in range(3)]
    figure = layer_errors(rows)
    assert [trace.name for trace in figure.data] == ["Round to nearest", "This job"]
    assert list(figure.data[1].y) == pytest.approx([0.4] * 3)
    assert list(figure.data[0].x) == [0, 1, 2]
    assert figure.data[0].line.dash == "dash"


def test_layer_chart_has_a_line_per_configuration_and_draws_equal_roundings_once():
    rows = [
        {"configuration": name, "layer": f"model.layers.{i}", "error": error, "rtn_error": nearest}
        for i in range(3)
        for name, error, nearest in (
            ("awq", 0.004, 0.01),
            ("gptq", 0.003, 0.0101),
            ("w3", 0.02, 0.05),
            ("other", 0.1, None),
        )
    ]
    figure = layer_errors(rows, {"awq": "AWQ 4 bit"})
    names = [trace.name for trace in figure.data]
    assert names == ["Round to nearest, as AWQ 4 bit", "AWQ 4 bit", "gptq", "Round to nearest, as w3", "w3", "other"]
    assert figure.data[3].line.color == figure.data[4].line.color != figure.data[1].line.color


def test_sizes_against_scores_mark_the_baseline_and_label_the_points():
    figure = size_against("Perplexity, gptq", (12.6, 2.5), [("w4", 5.6, 2.52), ("w3", 4.8, 2.7)])
    base, points = figure.data
    assert (list(base.x), list(base.y), base.marker.symbol) == ([12.6], [2.5], "diamond")
    assert list(points.text) == ["w4", "w3"] and list(points.x) == [5.6, 4.8]
    assert figure.layout.shapes[0].y0 == 2.5


def test_charts_work_in_light_and_dark():
    row = {"baseline": 1.0, "quantized": 2.0, "impact": 1.0, "interval": None}
    for figure in (layer_errors([]), comparison("x", "y", [("job", row)])):
        layout = json.loads(figure.to_json())["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"


def test_numbers_for_people():
    assert (size(999), size(4_210_000), size(15_100_000_000), size(None)) == ("999 B", "4.21 MB", "15.1 GB", "-")
    assert (duration(4.24), duration(65), duration(7800), duration(None)) == ("4.2 s", "1 min 05 s", "2 h 10 min", "-")
    assert (count(8.03e9), count(6_290_000), count(12)) == ("8.03 billion", "6.29 million", "12")
    assert ago(None) == "-"
