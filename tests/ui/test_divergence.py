"""How far a model is from its base model, on the job's page and in the comparison."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import pytest

from backend.evaluate.divergence import Divergence
from backend.evaluate.fidelity import metrics_of
from backend.evaluate.report import build_rows
from backend.formats.bits import StoredBits
from backend.jobs import launch
from backend.jobs.job import Job
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from ui.draft import TEMPLATE
from ui.pages import compare
from ui.pages import job as job_page
from ui.resultview import combined_html, result_table

DENSE = StoredBits(None, 16.0, 1000, 1000)


def rows(kl: float, bits: float) -> list[dict[str, Any]]:
    """The rows of a model, as a job makes them."""
    protocol = {
        "windows": 8, "windows_of_text": 9, "window": 512, "tokens": 4096, "base": "a/model", "text": "text:test",
        "dtype": "bfloat16", "device": "cpu",
    }  # fmt: skip
    samples = [kl * (0.9 + 0.2 * (i % 2)) for i in range(8)]
    fidelity = metrics_of(Divergence(samples, [0.01, 0.03] * 4), protocol)
    return build_rows(
        {"metrics": []}, {"metrics": []}, bits=(DENSE, StoredBits(bits, bits, 1000, 0)), fidelity=fidelity
    )


def entry(name: str, kl: float, bits: float) -> dict[str, Any]:
    return {
        "name": name, "label": name.upper(), "artefact": f"/models/{name}", "rows": rows(kl, bits), "table": "",
        "layers": [], "skipped": {}, "notes": [], "manifest": {}, "bytes": 1, "reason": None,
    }  # fmt: skip


TWO = [entry("w4", 0.00071, 4.16), entry("w2", 0.0276, 2.14)]


@pytest.fixture
def finished(home: Home, monkeypatch: pytest.MonkeyPatch) -> Job:
    """A job with two measured results."""
    monkeypatch.setattr(launch, "ensure_scheduler", lambda home: False)
    store = JobStore(home)
    job = store.create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    assert store.grant(job.uid, 1, ["cpu:0"]) and store.move(job.uid, "running", actor="runner", attempt=1)
    assert store.update(job.uid, 1, result={"results": TWO, "rows": TWO[0]["rows"], "artefact": "/models/w4"})
    assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
    return store.get(job.uid)


def handlers(build: Any, home: Home) -> dict[str, Any]:
    with gr.Blocks() as demo:
        build(demo, home)
    return {fn.fn.__name__: fn.fn for fn in demo.fns.values()}


def drawn(updates: list[Any]) -> list[dict[str, Any]]:
    """The figures among some updates of a page, as the browser gets them."""
    plots = [update for update in updates if isinstance(update, gr.Plot) and update.value is not None]
    return [json.loads(plot.value["plot"]) for plot in plots]


def titles(figures: list[dict[str, Any]]) -> list[str]:
    return [figure["layout"]["title"]["text"] for figure in figures]


def test_a_result_tells_divergence_with_its_interval_and_bits() -> None:
    html = result_table("a/model", rows(0.00071, 4.16))
    assert "0 nats/token</td>" in html and "0.000710 nats/token</td>" in html
    assert 'qd-delta-bad">+0.000710 nats/token' in html and "+0.000647 to +0.000773" in html
    assert "Top-1 Flips ↓" in html and "2.00 %</td>" in html and "+2.00 points" in html
    assert "16.00 bits</td>" in html and 'qd-delta-good">-11.84 bits' in html


def test_in_the_table_of_several_a_divergence_stands_beside_half_its_interval() -> None:
    body = combined_html("a/model", TWO).split("<tbody>")[1].split("</tbody>")[0]
    baseline, w4, w2 = body.split("<tr")[1:]
    assert baseline.count(">0</td>") == 2 and ">16.00</td>" in baseline
    assert 'qd-muted">±0.000063' in w4 and ">0.000710<" in w4 and ">0.0276<" in w2


def test_the_jobs_page_draws_divergence_against_bits_once(home: Home, finished: Job) -> None:
    show = handlers(job_page.build, home)["show"]
    first = show({"uid": finished.uid})
    (figure,) = drawn(first)
    assert figure["layout"]["title"]["text"].startswith("KL divergence against stored bits per weight")
    assert figure["data"][1]["text"] == ["w4", "w2"] and figure["data"][1]["x"] == [4.16, 2.14]
    assert drawn(show(first[0])) == []


def test_the_comparison_draws_divergence_alone_bits_in_pairs_and_both_against_each_other(
    home: Home, finished: Job
) -> None:
    on_jobs = handlers(compare.build, home)["on_jobs"]
    keys = [f"{finished.uid}/{one['name']}" for one in TWO]
    figures = drawn(on_jobs(keys))
    assert [title.partition(" ↓")[0] for title in titles(figures)[1:]] == ["KL divergence", "Bits per weight"]
    tradeoff, divergence, bits = figures
    assert [trace["name"] for trace in divergence["data"]] == ["Quantized"]
    assert [trace["name"] for trace in bits["data"]] == ["Baseline", "Quantized"]
    assert [label.rpartition(" / ")[2] for label in tradeoff["data"][1]["text"]] == ["w4", "w2"]
    assert "8 of 9 windows" in on_jobs(keys)[1].value
    assert len(drawn(on_jobs(keys[:1]))) == 2  # of one model alone there is nothing to choose between
