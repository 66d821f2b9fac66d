"""What a job looks like in each state, and that nothing a job says can become HTML."""

from __future__ import annotations

import pytest

from backend.jobs.store import Job
from ui import jobview
from ui.pages.compare import chart_note, delta_table, figure_for, protocols_of, rows_for
from ui.pages.jobs import table_html, title_html

EVIL = '<img src=x onerror="alert(1)">'


def row(metric="perplexity", name="Perplexity (wikitext)", unit="", before=7.32, after=7.69, interval=None, **more):
    return {
        "metric": metric, "name": name, "unit": unit, "protocol": "512-token windows", "baseline": before,
        "quantized": after, "impact": after - before, "interval": interval, "interval_method": None,
        "higher_is_better": False, "cached_at": None, **more,
    }  # fmt: skip


def job(state="running", **more):
    facts = {
        "uid": "0123", "job_id": "a-job", "folder": "f", "model": "quantdeck/demo", "algorithm": "AutoAWQ",
        "device": "cpu", "state": state, "reason": None, "attempt": 1, "config_yaml": "", "artefact": None,
        "created_at": "2026-01-01T00:00:00+00:00", "started_at": "2026-01-01T00:00:00+00:00",
        "finished_at": "2026-01-01T00:01:05+00:00",
    }  # fmt: skip
    return Job(**{**facts, **more})


@pytest.mark.parametrize(
    ("state", "offered", "missing"),
    [
        ("queued", {"Open", "Clone", "YAML", "Cancel"}, {"Chat"}),
        ("running", {"Open", "Clone", "YAML", "Cancel"}, {"Chat"}),
        ("cancelling", {"Open", "Clone", "YAML"}, {">Cancel<"}),
        ("succeeded", {"Open", "Clone", "YAML"}, {">Cancel<"}),
        ("failed", {"Open", "Clone", "YAML"}, {">Cancel<", "Chat"}),
    ],
)
def test_only_what_makes_sense_is_offered(state, offered, missing):
    html = jobview.actions(job(state), here=False)
    assert all(word in html for word in offered)
    assert not any(word in html for word in missing)


def test_a_job_that_succeeded_leads_to_chat_and_compare():
    html = jobview.actions(job("succeeded", result={"rows": [row()]}), here=True)
    assert "/chat?job=0123" in html and "/compare?jobs=0123" in html


@pytest.mark.parametrize("state", ["queued", "running", "failed", "succeeded", "cancelled"])
def test_nothing_of_a_job_becomes_html(state):
    bad = job(
        state, job_id=EVIL, model=EVIL, algorithm=EVIL, reason=EVIL, artefact=EVIL,
        progress={"stage": "quantize", "step": 1, "total": 2, "message": EVIL},
        result={"rows": [row(name=EVIL, protocol=EVIL)], "device": EVIL, "timings": {}},
    )  # fmt: skip
    pages = (
        table_html([bad]), title_html([bad]), jobview.overview(bad), jobview.stage_list(bad), delta_table([bad]),
        jobview.result_table(bad), jobview.artefact(bad, [(EVIL, 1)]), jobview.actions(bad, here=True),
        chart_note([(EVIL, row(name=EVIL))], 1, False),
    )  # fmt: skip
    assert not any("<img" in html for html in pages)


def test_numbers_keep_their_unit_and_sign():
    assert jobview.impact_text(row()) == "+0.37"
    accuracy = row("accuracy", "arc", "%", 60.66, 59.73, [-2.0, 0.1], higher_is_better=True)
    assert jobview.value_text(accuracy, 60.66) == "60.66 %"
    assert jobview.impact_text(accuracy) == "-0.93 points"
    assert jobview.interval_text(accuracy) == "-2.00 to +0.10, within noise"
    assert jobview.impact_class(accuracy) == "qd-delta-none"
    assert jobview.impact_class(row(interval=[0.1, 0.6])) == "qd-delta-bad"


def test_progress_names_the_layer_and_the_time_left():
    now = job(progress={"stage": "quantize", "step": 3, "total": 6, "eta_s": 75.0, "message": "model.layers.2"})
    html = jobview.stage_list(now)
    assert "3 of 6 · model.layers.2 · about 1 min 15 s left" in html
    assert 0 < jobview.fraction_done(now) < 1
    assert jobview.fraction_done(job("succeeded")) == 1


def test_a_failure_tells_its_reason_and_what_was_kept():
    html = jobview.overview(job("failed", reason="out of memory", artefact="/x/y"))
    assert "out of memory" in html and "/x/y" in html


def test_protocols_are_never_mixed_in_a_chart():
    other = row(protocol="all tokens scored", before=6.14)
    jobs = [job("succeeded", job_id="b", result={"rows": [other]}), job("succeeded", result={"rows": [row(), other]})]
    assert len(protocols_of(jobs, "perplexity")) == 2
    first = protocols_of(jobs, "perplexity")[0]
    assert "all tokens scored" in first  # the one that more jobs share
    assert [label for label, _ in rows_for(jobs, "perplexity", first)] == ["a-job", "b"]


def test_sizes_of_different_units_share_one_axis():
    rows = [("small", row("size", "Size", "MB", 500.0, 150.0)), ("large", row("size", "Size", "GB", 15.0, 5.4))]
    figure = figure_for("size", rows)
    assert list(figure.data[0].y) == pytest.approx([0.5, 15.0])
    assert figure.layout.yaxis.title.text == "GB"


def test_error_bars_are_the_interval_of_the_difference():
    figure = figure_for("perplexity", [("a", row(interval=[0.2, 0.5]))])
    bars = figure.data[1].error_y
    assert figure.data[0].error_y.array is None
    assert (bars.array[0], bars.arrayminus[0]) == pytest.approx((0.13, 0.17))
