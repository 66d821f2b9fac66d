"""The figures hold plain numbers and transparent grounds, and can be sent to the browser."""

from __future__ import annotations

import json
import math

import pytest

from ui.charts import comparison, cost_against_divergence, layer_errors, size_against, tuning_curve
from ui.format import ago, count, duration, size
from ui.pareto import Point, Tradeoff, tradeoff


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


def test_a_finetuned_layer_is_shown_beside_what_it_was_before():
    rows = [
        {"configuration": "calibrated", "layer": f"model.layers.{i}", "error": 0.02, "before_error": before}
        for i, before in enumerate((0.03, 0.02))
    ]
    before, after = layer_errors(rows, {"calibrated": "AQLM"}).data
    assert (before.name, after.name, before.line.dash) == ("Before block finetuning", "AQLM", "dash")
    assert list(before.y) == pytest.approx([3.0, 2.0])
    same = [{**row, "before_error": row["error"]} for row in rows]
    assert [trace.name for trace in layer_errors(same).data] == ["calibrated"]


def test_a_tuning_curve_marks_the_step_that_is_kept():
    rows = [
        {"step": 0, "loss": None, "validation": 0.01},
        {"step": 1, "loss": 0.012, "validation": None},
        {"step": 2, "loss": 0.011, "validation": 0.007},
        {"step": 3, "loss": 0.009, "validation": 0.008},
    ]
    loss, validation, best = tuning_curve(rows).data
    assert list(loss.x) == [1, 2, 3] and list(validation.x) == [0, 2, 3]
    assert (list(best.x), list(best.y)) == ([2], [0.007])
    assert [trace.name for trace in tuning_curve(rows[1:2]).data] == ["Training", "Validation"]


def test_sizes_against_scores_mark_the_baseline_and_label_the_points():
    figure = size_against("Perplexity, gptq", (12.6, 2.5), [("w4", 5.6, 2.52), ("w3", 4.8, 2.7)])
    base, points = figure.data
    assert (list(base.x), list(base.y), base.marker.symbol) == ([12.6], [2.5], "diamond")
    assert list(points.text) == ["w4", "w3"] and list(points.x) == [5.6, 4.8]
    assert figure.layout.shapes[0].y0 == 2.5


def rows(kl, bits=None, size=5.0, interval=None, protocol="p", more_bits=None):
    """What a job measured of one configuration."""
    found = [
        {"metric": "size", "unit": "MB", "quantized": size},
        {"metric": "KL divergence", "quantized": kl, "interval": interval, "protocol": "how", "protocol_id": protocol},
    ]
    return found + [{"metric": "bits per weight", "quantized": b} for b in (bits, more_bits) if b is not None]


def test_divergence_is_drawn_against_bits_and_the_best_are_joined():
    found = tradeoff(
        [("w4", rows(7e-4, 4.2, interval=[6e-4, 8e-4])), ("w2", rows(0.02, 2.1)), ("bad", rows(0.03, 3.1))]
    )
    assert found == Tradeoff(
        "stored bits per weight",
        "how",
        [Point("w4", 4.2, 7e-4, (6e-4, 8e-4)), Point("w2", 2.1, 0.02), Point("bad", 3.1, 0.03)],
    )
    line, points = cost_against_divergence(found).data
    assert (list(line.x), list(line.y)) == ([2.1, 4.2], [0.02, 7e-4])
    assert list(points.text) == ["w4", "w2", "bad"] and list(points.error_y.array) == pytest.approx([1e-4, 0, 0])
    assert cost_against_divergence(found).layout.yaxis.type == "log"


def test_divergence_of_one_protocol_only_and_never_of_one_model_alone():
    assert tradeoff([("a", rows(0.1, 2.0))]) is None
    assert tradeoff([("a", rows(0.1, 2.0)), ("b", rows(0.1, 2.0, protocol="other"))]) is None
    assert tradeoff([("a", rows(0.1, 2.0)), ("same", rows(0.0, 16.0))]) is None
    three = [("a", rows(0.1, 2.0)), ("b", rows(0.2, 2.0, protocol="other")), ("c", rows(0.3, 3.0))]
    assert [p.label for p in tradeoff(three).points] == ["a", "c"]


def test_sizes_stand_in_for_bits_and_bits_of_all_linears_come_first():
    found = tradeoff([("a", rows(0.1, 2.0)), ("b", rows(0.2, size=7.0))])
    assert found.axis == "size of the weight files (MB)" and [p.cost for p in found.points] == [5.0, 7.0]
    found = tradeoff([("a", rows(0.1, 2.0)), ("kept", rows(0.05, 2.0, more_bits=6.0))])
    assert found.axis == "stored bits per weight" and [p.cost for p in found.points] == [2.0, 6.0]


def test_divergences_that_are_nearly_equal_have_ticks_too():
    def bounds(*values):
        points = [Point(str(kl), 2.0, kl, (0.9 * kl, 1.1 * kl)) for kl in values]
        axis = cost_against_divergence(Tradeoff("stored bits per weight", "how", points)).layout.yaxis
        assert axis.range[0] < math.log10(0.9 * min(values)) and math.log10(1.1 * max(values)) < axis.range[1]
        return axis.range[1] - axis.range[0], axis.dtick

    assert bounds(0.0161, 0.0169) == (pytest.approx(0.8), "D2")
    assert bounds(6e-5, 0.03)[1] == 1


def test_a_distance_has_no_bar_of_the_baseline():
    row = {"baseline": 0.0, "quantized": 0.0007, "impact": 0.0007, "interval": [0.0006, 0.0008]}
    (only,) = comparison("KL divergence", "nats/token", [("job", row)]).data
    assert only.name == "Quantized" and list(only.text) == ["0.0007"]
    assert list(only.error_y.array) == pytest.approx([1e-4])


def test_charts_work_in_light_and_dark():
    row = {"baseline": 1.0, "quantized": 2.0, "impact": 1.0, "interval": None}
    for figure in (layer_errors([]), tuning_curve([]), comparison("x", "y", [("job", row)])):
        layout = json.loads(figure.to_json())["layout"]
        assert layout["paper_bgcolor"] == layout["plot_bgcolor"] == "rgba(0,0,0,0)"


def test_numbers_for_people():
    assert (size(999), size(4_210_000), size(15_100_000_000), size(None)) == ("999 B", "4.21 MB", "15.1 GB", "-")
    assert (duration(4.24), duration(65), duration(7800), duration(None)) == ("4.2 s", "1 min 05 s", "2 h 10 min", "-")
    assert (count(8.03e9), count(6_290_000), count(12)) == ("8.03 billion", "6.29 million", "12")
    assert ago(None) == "-"
