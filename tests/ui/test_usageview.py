"""How the use of memory, processors and GPUs is drawn and told."""

from __future__ import annotations

import json

import pytest

from backend.jobs.gpu_meter import GpuUse
from backend.jobs.usage import Sample
from ui.usagechart import POINTS, on_one_axis, usage_chart
from ui.usageview import pace_s, peaks, usage_words

GB = 10**9


def sample(at, stage="quantize", memory=GB, cores=1.0, seconds=1.0, attempt=1, gpus=(), configuration=""):
    return Sample(attempt, at, seconds, stage, configuration, memory, cores, gpus)


def by_name(figure):
    return {trace.name: trace for trace in figure.data}


def test_memory_stands_above_cores_over_the_same_time():
    figure = usage_chart([sample(float(i), memory=i * GB // 2, cores=i / 10) for i in range(1, 5)], "Native")
    drawn = by_name(figure)
    assert list(drawn["Memory"].y) == [0.5, 1.0, 1.5, 2.0] and figure.layout.yaxis.title.text == "memory (GB)"
    assert list(drawn["Cores"].y) == [0.1, 0.2, 0.3, 0.4] and drawn["Cores"].yaxis == "y2"
    assert list(drawn["Memory"].x) == list(drawn["Cores"].x) == [1, 2, 3, 4]
    assert figure.layout.xaxis.title.text == "seconds of work" and not figure.layout.showlegend
    assert set(drawn["Memory"].customdata) == {"Quantize layer by layer"}
    small = usage_chart([sample(1.0, memory=200 * 10**6)], "Native")
    assert list(small.data[0].y) == [200.0] and small.layout.yaxis.title.text == "memory (MB)"


@pytest.mark.parametrize(
    ("seconds", "unit", "last"), [(170, "seconds", 170), (1200, "minutes", 20), (86400, "hours", 24)]
)
def test_time_is_told_in_a_unit_that_suits_it(seconds, unit, last):
    figure = usage_chart([sample(1.0), sample(float(seconds))], "Native")
    assert figure.layout.xaxis.title.text == f"{unit} of work" and figure.data[0].x[-1] == pytest.approx(last)


def test_stages_are_bands_and_the_long_ones_have_a_name():
    stages = ["download"] * 2 + ["calibrate"] * 8 + ["save"] * 1 + ["evaluate_baseline"] * 9
    samples = [sample(float(i + 1), stage) for i, stage in enumerate(stages)]
    figure = usage_chart(samples, "Native")
    assert [(shape.x0, shape.x1) for shape in figure.layout.shapes] == [(2, 10), (11, 20)]
    assert [one.text for one in figure.layout.annotations] == ["Calibrate", "Evaluate"]
    assert usage_chart([sample(1.0, "<b>x</b>")], "Native").layout.annotations[0].text == "&lt;b&gt;x&lt;/b&gt;"
    assert usage_chart([sample(1.0, "")], "Native").data[0].customdata == ("Start",)


def test_attempts_follow_one_another_without_the_wait():
    samples = [sample(1.0), sample(2.0), sample(1.0, attempt=2), sample(5.0, attempt=2), sample(1.0, attempt=4)]
    assert [one.at for one in on_one_axis(samples)] == [1.0, 2.0, 3.0, 7.0, 8.0]


def test_gpus_have_lines_of_their_own_and_are_told_with_what_they_have():
    samples = [
        sample(1.0, gpus=(GpuUse(0, 20 * GB, 80 * GB, 50), GpuUse(2, 10 * GB, 80 * GB, None))),
        sample(2.0, gpus=(GpuUse(0, 40 * GB, 80 * GB, 100),)),
    ]
    figure = usage_chart(samples, "Native")
    drawn = by_name(figure)
    assert list(drawn["GPU 0 memory"].y) == [20, 40] and list(drawn["GPU 2 memory"].y) == [10, None]
    assert list(drawn["GPU 0 busy"].y) == [50, 100] and "GPU 2 busy" not in drawn
    assert drawn["GPU 0 busy"].yaxis == "y3" and list(figure.layout.yaxis3.range) == [0, 100]
    assert figure.layout.yaxis3.title.text == "GPU busy (%)" and figure.layout.yaxis2.title.text == "cores"
    assert figure.layout.showlegend and figure.layout.yaxis.title.text == "memory (GB)"
    words = usage_words(samples, "Native", running=False)
    assert "GPU 0: at most 40.0 GB of 80.0 GB, busy 75 % of the time." in words
    assert "GPU 2: at most 10.0 GB of 80.0 GB." in words


def test_peak_and_means_weigh_samples_by_their_seconds():
    found = peaks([sample(10.0, memory=3 * GB, cores=4.0, seconds=9.0), sample(11.0, "benchmark", 2 * GB, cores=1.0)])
    assert (found.most.memory, found.most.stage, found.cores) == (3 * GB, "quantize", pytest.approx(3.7))
    words = usage_words([sample(1.0, memory=3 * GB), sample(2.0, cores=0.5)], "Native", running=True)
    assert "Now 1.00 GB, 0.5 cores. At most 3.00 GB of memory" in words and "(Quantize layer by layer)" in words


def test_the_chart_of_a_long_job_stays_small():
    samples = [sample(float(i), memory=GB + 9876543 * (i % 50)) for i in range(3000)]
    text = usage_chart(samples, "Native").to_json()
    assert len(json.loads(text)["data"][0]["y"]) <= POINTS and len(text) < 120_000
    assert max(usage_chart(samples, "Native").data[0].y) == pytest.approx(1.4839, abs=1e-3)  # the peak is kept
    assert (pace_s(1000), pace_s(100_000), pace_s(400_000)) == (1.0, 5.0, 10.0)


def test_nothing_is_drawn_of_nothing():
    layout = json.loads(usage_chart([], "Native").to_json())["layout"]
    assert layout["paper_bgcolor"] == "rgba(0,0,0,0)"
