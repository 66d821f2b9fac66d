"""What a job looks like in each state, and that nothing a job says can become HTML."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from backend.errors import JobError
from backend.jobs import outcomes
from backend.jobs.states import ACTIVE, FINAL
from backend.jobs.store import Job, JobStore
from backend.schema import parse_yaml
from ui import jobview, layout, madeview, resultview
from ui.draft import TEMPLATE
from ui.jobcharts import size_points
from ui.jobslist import Listing, View
from ui.jobstable import filters_html, table_html, title_html
from ui.pages.chat import head_html as head_of_pane
from ui.pages.chat import models_to_choose
from ui.pages.compare import Measured, chart_note, delta_table, figure_for, measurements, protocols_of, rows_for
from ui.pages.job import head_html, result_html
from ui.reading import store_notice
from ui.yamlview import yaml_html

EVIL = '<img src=x onerror="alert(1)"><script>alert(2)</script>\x1b[2J\x1b]0;title\x07\u202egpj.exe\u2066\x00\ud800\x9b'
INERT = "&lt;img src=x onerror=&quot;alert(1)&quot;&gt;"
LOUD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def row(metric="perplexity", name="Perplexity (wikitext)", unit="", before=7.32, after=7.69, interval=None, **more):
    return {
        "metric": metric, "name": name, "unit": unit, "protocol": "512-token windows", "protocol_id": name,
        "baseline": before, "quantized": after, "impact": after - before, "interval": interval, "interval_method": None,
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


def entry(name="w4", rows=None, **more):
    return {
        "name": name, "label": name.upper(), "artefact": f"/models/{name}", "rows": [row()] if rows is None else rows,
        "table": "", "layers": [], "skipped": {}, "notes": [], "manifest": {}, "bytes": 1, "reason": None, **more,
    }  # fmt: skip


def measured(label="a-job", *rows):
    return Measured(label, label, label, list(rows))


def listing(*jobs, **view):
    groups = {"": len(jobs)}
    counts = {}
    for one in jobs:
        counts[one.state] = counts.get(one.state, 0) + 1
    return Listing(View(**view), list(jobs), {}, groups, counts)


def buttons(html):
    """The words of links and buttons."""
    return set(re.findall(r">([^<]+)</(?:a|button)>", html))


@pytest.mark.parametrize(
    ("state", "offered"),
    [
        ("queued", {"Cancel"}),
        ("starting", {"Cancel"}),
        ("running", {"Cancel"}),
        ("lost", {"Cancel"}),
        ("cancelling", set()),
        ("succeeded", set()),
        ("failed", {"Resume"}),
        ("cancelled", {"Resume"}),
    ],
)
def test_only_what_makes_sense_is_offered(state, offered):
    assert buttons(jobview.actions(job(state), here=False)) == {"Open", "Clone", "YAML"} | offered
    more = {"Chat with both", "Measure again", "Reproduce"} if state == "succeeded" else set()
    more |= {"Delete"} if state in FINAL else set()
    assert buttons(jobview.actions(job(state), here=True)) == {"Clone", "YAML"} | offered | more


def test_a_deleted_job_can_be_restored_and_says_that_it_is_deleted():
    gone = job("failed", deleted_at="2026-01-01T00:00:00.000+00:00")
    assert buttons(jobview.actions(gone, here=False)) == {"Open", "Restore", "Delete for good"}
    assert buttons(jobview.actions(gone, here=True)) == {"Restore"}
    assert ">Deleted</span>" in jobview.badges(gone) and "This job is deleted" in jobview.overview(gone)
    half = replace(gone, erased="begun")
    assert buttons(jobview.actions(half, here=False)) == {"Delete for good"} and "Half deleted" in jobview.badges(half)


@pytest.mark.parametrize("state", ["failed", "cancelled"])
def test_a_saved_model_can_be_measured_again_even_if_the_job_did_not_succeed(state):
    assert "Measure again" in buttons(jobview.actions(job(state, artefact="/x"), here=True))
    assert "Measure again" not in buttons(jobview.actions(job("running", artefact="/x"), here=True))


def test_a_job_that_succeeded_leads_to_chat_and_compare():
    html = jobview.actions(job("succeeded", result={"rows": [row()]}), here=True)
    assert "/chat?job=0123" in html and "/compare?jobs=0123" in html


@pytest.mark.parametrize("stalled", [False, True])
@pytest.mark.parametrize("state", [*ACTIVE, *FINAL])
def test_nothing_of_a_job_becomes_html(state, stalled):
    bad = job(
        state, uid=EVIL, job_id=EVIL, model=EVIL, algorithm=EVIL, device=EVIL, reason=EVIL, artefact=EVIL,
        outcome=EVIL, stalled=stalled,
        progress={"stage": "quantize", "step": 1, "total": 2, "message": EVIL, "configuration": EVIL},
        result={"rows": [row(name=EVIL, protocol=EVIL)], "device": EVIL, "timings": {}},
    )  # fmt: skip
    evil = [
        entry(
            EVIL, [row(name=EVIL, protocol=EVIL), row("size", name=EVIL, unit="MB")], label=EVIL, artefact=EVIL,
            skipped={EVIL: EVIL}, notes=[EVIL], layers=[{"layer": EVIL, "notes": [EVIL]}], reason=EVIL,
        )
    ] * 2  # fmt: skip
    change = {"at": EVIL, "attempt": EVIL, "to_state": EVIL, "actor": EVIL, "reason": EVIL}
    page = listing(bad, search=EVIL)
    texts = (
        table_html(page), jobview.overview(bad), result_html(bad), head_html(bad),
        delta_table([measured(EVIL, row(name=EVIL, protocol=EVIL))]), jobview.actions(bad, here=True),
        madeview.made(EVIL, evil), madeview.notes(evil), chart_note([(EVIL, row(name=EVIL))], 1, False),
        result_html(job(state, model=EVIL, result={"results": evil})), jobview.history_table([change]),
        layout.notice("error", EVIL, EVIL), layout.facts([(EVIL, EVIL)]), layout.card("", EVIL),
        layout.link(EVIL, EVIL, download=EVIL), layout.action(EVIL, EVIL, EVIL, confirm=EVIL, title=EVIL),
        layout.empty(EVIL, EVIL), layout.title(EVIL), store_notice(JobError(EVIL)), jobview.badge(EVIL),
        yaml_html(f"MODEL: {EVIL}\n# {EVIL}", EVIL, EVIL), head_of_pane("baseline", EVIL),
    )  # fmt: skip
    for html in texts:
        assert INERT in html  # the text is there to be read
    others = (jobview.stage_list(bad), title_html(page), filters_html(page))
    for html in (*texts, *others):
        assert "<img" not in html and "<script" not in html
        assert not LOUD.search(html)
        html.encode("utf-8")  # half a character would break the answer


def test_choices_of_a_list_are_inert_as_well():
    bad = job("succeeded", job_id="a\u202eb", model="\x1b[31mred", result={"results": [entry("w4")]})
    assert models_to_choose([bad])[0][0].startswith("a<U+202E>b, ␛[31mred")


def test_numbers_keep_their_unit_and_sign():
    assert resultview.impact_text(row()) == "+0.37"
    accuracy = row("accuracy", "arc", "%", 60.66, 59.73, [-2.0, 0.1], higher_is_better=True)
    assert resultview.value_text(accuracy, 60.66) == "60.66 %"
    assert resultview.impact_text(accuracy) == "-0.93 points"
    assert resultview.interval_text(accuracy) == "-2.00 to +0.10, within noise"
    assert resultview.impact_class(accuracy) == "qd-delta-none"
    assert resultview.impact_class(row(interval=[0.1, 0.6])) == "qd-delta-bad"


def test_progress_names_the_layer_and_the_time_left():
    now = job(progress={"stage": "quantize", "step": 3, "total": 6, "eta_s": 75.0, "message": "model.layers.2"})
    html = jobview.stage_list(now)
    assert "3 of 6 · model.layers.2 · about 1 min 15 s left" in html
    assert 0 < jobview.fraction_done(now) < 1
    assert jobview.fraction_done(job("succeeded")) == 1


def test_a_failure_tells_its_reason_and_what_was_kept():
    html = jobview.overview(job("failed", reason="out of memory", artefact="/x/y"))
    assert "out of memory" in html and "/x/y" in html


def test_a_failure_tells_what_can_be_done():
    html = jobview.overview(job("failed", reason="killed", outcome="out_of_memory"))
    assert layout.esc(outcomes.advice("out_of_memory")) in html
    told = jobview.overview(job("failed", reason="killed", outcome="a code of the future"))
    assert "This job failed" in told and "To retry it, press Resume" in told
    assert "To retry it" not in jobview.overview(job("failed", reason="no space; resume the job when there is some"))
    assert 'title="Retry: go on' in jobview.actions(job("failed"), here=True)


@pytest.mark.parametrize(
    ("state", "more", "told"),
    [
        ("queued", {"reason": "waiting: job b uses GPU 0"}, "waiting: job b uses GPU 0"),
        ("queued", {}, "This job waits"),
        ("starting", {}, "its process is being started"),
        ("lost", {"reason": "the runner died"}, "the runner died. Its process is gone"),
        ("cancelling", {}, "told to stop, and has not answered yet"),
        ("cancelling", {"progress": {"message": "cancelling: asked to stop (SIGINT)"}}, "Asked to stop (SIGINT)"),
        ("cancelling", {"progress": {"message": "cancelling: killed (SIGKILL)"}}, "Killed (SIGKILL)"),
        ("cancelling", {"progress": {"message": "waiting for processes 7, 8, which"}}, "Waiting for processes 7, 8"),
        ("cancelling", {"progress": {"message": "model.layers.3"}}, "told to stop, and has not answered yet"),
        ("cancelled", {"reason": "cancel requested"}, "cancel requested"),
    ],
)
def test_the_page_tells_what_the_job_waits_for(state, more, told):
    assert told in jobview.overview(job(state, **more))
    assert jobview.badge(state) in head_html(job(state))


def test_a_silent_job_is_told_apart_from_a_dead_one():
    assert "No sign of life for a while" in jobview.overview(job("running", stalled=True))
    assert "No sign of life" in table_html(listing(job("running", stalled=True)))
    assert "No sign of life" not in jobview.overview(job("running"))
    assert "No sign of life" not in jobview.overview(job("succeeded", stalled=True))  # it is over


def test_the_list_shows_reason_priority_and_progress():
    waits = job("queued", reason="waiting: 2 of 2 CPU slots are busy", priority=5)
    works = job(progress={"stage": "quantize", "step": 3, "total": 6, "eta_s": 75.0})
    ends = job("cancelling", progress={"message": "cancelling: asked to stop (SIGINT)"})
    html = table_html(listing(waits, works, ends))
    assert "waiting: 2 of 2 CPU slots are busy" in html and "priority 5" in html
    assert "28 % · Quantize layer by layer · about 1 min 15 s left" in html
    assert "asked to stop (SIGINT)" in html


def test_history_shows_the_newest_changes_and_counts_the_rest():
    def change(number):
        return {"at": "2026-01-01T00:00:00", "attempt": number, "to_state": "queued", "actor": "user", "reason": None}

    html = jobview.history_table([change(number) for number in range(1, 31)])
    assert html.count("<tr>") == 1 + jobview.MAX_HISTORY and "10 earlier changes" in html
    assert html.index(">30<") < html.index(">11<") and ">10<" not in html and ">user<" in html
    assert jobview.history_table([]) == ""


def test_broken_progress_does_not_break_the_page():
    for progress in ({"step": "x", "total": None}, {"stage": 3, "step": 1, "total": 0}, {"step": 9, "total": 3}):
        for state in ACTIVE:
            one = job(state, progress={"stage": "quantize", **progress}, created_at="garbage", started_at="?")
            html = jobview.stage_list(one) + jobview.overview(one) + table_html(listing(one))
            assert 0 <= jobview.fraction_done(one) <= 1 and "a-job" in html


def test_protocols_are_never_mixed_in_a_chart():
    other = row(protocol="all tokens scored", before=6.14)
    chosen = [measured("a-job", row(), other), measured("b", other)]
    assert len(protocols_of(chosen, "perplexity")) == 2
    first = protocols_of(chosen, "perplexity")[0]
    assert "all tokens scored" in first  # the one that more jobs share
    assert [label for label, _ in rows_for(chosen, "perplexity", first)] == ["a-job", "b"]


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


def several(**more):
    entries = [
        entry("w4", [row(after=7.5, interval=[0.1, 0.3]), row("size", "Size", "MB", 12.0, 5.0)]),
        entry("w3", [row(after=8.5), row("size", "Size", "MB", 12.0, 4.0)]),
        entry("w2", [], reason="out of luck"),
    ]
    return job("succeeded", **{"result": {"results": entries, "rows": entries[0]["rows"], "artefact": "/x"}, **more})


def test_several_configurations_share_a_table_with_the_baseline_first():
    html = result_html(several())
    body = html.split("<tbody>")[1].split("</tbody>")[0]
    assert [line.split("</strong>")[0] for line in body.split("<strong>")[1:]] == ["Baseline, 16 bit", "W4", "W3", "W2"]
    assert 'qd-delta-bad">+0.18' in body and "-58 %" in body and "out of luck" in body
    assert html.count("<details>") == 2  # the one that was not measured has no numbers of its own


def test_one_configuration_keeps_the_guides_table():
    html = result_html(job("succeeded", result={"results": [entry()], "rows": [row()]}))
    assert "<details>" not in html and "<th>Model</th><th>Task</th>" in html
    assert result_html(job("succeeded", result={"rows": [row()]})) == html  # a job of the first version


def test_the_list_tells_the_range_of_several_configurations():
    assert jobview.headline(several()) == "3 configurations, perplexity +0.18 to +1.18, 33.3 to 41.7 % of the size"


def test_size_against_perplexity_needs_two_points():
    heading, baseline, points = size_points(several().result["results"])
    assert (heading, baseline) == ("Perplexity (wikitext)", (12.0, 7.32))
    assert points == [("w4", 5.0, 7.5), ("w3", 4.0, 8.5)]
    assert size_points([entry()]) is None


def test_notes_group_what_is_the_same():
    kept = {f"model.layers.{i}.mlp.down_proj": "group size 128 does not divide its 96 inputs" for i in range(9)}
    singular = {"layer": "model.layers.3", "notes": ["q_proj: H was singular, damp raised to 0.1"]}
    html = madeview.notes(
        [entry(skipped=kept, layers=[singular], notes=["slow", f"{singular['layer']}: {singular['notes'][0]}"])]
    )
    assert html.count("<li>") == 3 and "and 3 more" in html
    assert "damp raised to 0.1 (<code>model.layers.3</code>)" in html
    assert madeview.notes([entry()]) == ""
    assert "<li>Measured with: packed int4 kernel</li>" in madeview.notes([entry(decode_path="packed int4 kernel")])


def test_every_configuration_can_be_compared_and_chatted_with(home):
    store = JobStore(home)
    made = store.create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    assert store.grant(made.uid, 1, ["cpu:0"]) and store.move(made.uid, "running", actor="runner", attempt=1)
    store.update(made.uid, 1, result=several().result)
    store.move(made.uid, "succeeded", actor="test", attempt=1)
    assert [one.label for one in measurements(home)] == ["my-first-job / w4", "my-first-job / w3"]
    keys = [key for _, key in models_to_choose(store.jobs())]
    assert keys == [f"{made.uid}/{name}" for name in ("w4", "w3", "w2")]


def test_files_and_serving_depend_on_the_bits(tmp_path):
    folder = tmp_path / "w3"
    folder.mkdir()
    config = {"quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}}}
    (folder / "config.json").write_text(json.dumps(config))
    html = madeview.made("0123", [entry("w3", artefact=str(folder))])
    assert "/download/0123/w3/config.json" in html and "vllm serve" not in html and "these have 3" in html
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"bits": 4}}))
    assert "vllm serve" in madeview.made("0123", [entry("w3", artefact=str(folder))])
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "aqlm"}}))
    html = madeview.made("0123", [entry("w3", artefact=str(folder))])
    assert "vllm serve" not in html and "NUMBA_NUM_THREADS=1" in html


def test_files_stand_beside_their_checksums_and_transformers_formats_name_lm_eval(tmp_path):
    folder = tmp_path / "a model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "compressed-tensors"}}))
    (folder / "other.txt").write_text("x")
    digest = "0123456789ab" + "c" * 52
    files = {"config.json": {"bytes": 1, "sha256": digest}, "other.txt": {"sha256": EVIL}}
    html = madeview.made("0123", [entry("w4", artefact=str(folder), manifest={"files": files})])
    assert f'<span title="{digest}">0123456789ab…</span>' in html and html.count("…</span>") == 1
    assert EVIL not in html and "lm_eval --model hf --model_args &#x27;pretrained=" in html
    (folder / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "modelopt"}}))
    assert "lm_eval --model" not in madeview.made("0123", [entry("w4", artefact=str(folder))])


@pytest.mark.parametrize("text", ["", "[]", '{"quantization_config": 5}', '{"quantization_config": {"bits": "x"}}'])
def test_a_model_that_was_damaged_since_does_not_break_the_page(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in madeview.made("0123", [entry("w4", artefact=str(tmp_path))])
    assert "/gone" in madeview.made("0123", [entry("w4", artefact="/gone")])


def test_names_of_files_stay_in_their_place_of_an_address(tmp_path):
    (tmp_path / "a?b#c%2F..%00.json").write_text("{}")
    html = madeview.made("0123", [entry("w4", artefact=str(tmp_path))])
    assert "/download/0123/w4/a%3Fb%23c%252F..%2500.json" in html


def test_a_stage_that_was_not_possible_is_not_ticked_off():
    timings = {"download": {"wall_s": 1.0}, "quantize": {"wall_s": 2.0}, "benchmark": {"wall_s": 0.1}}
    result = {"timings": timings, "incomplete": "no GPU"}
    html = jobview.stage_list(job("succeeded", algorithm="TensorRTLLM", result=result))
    before, _, after = html.partition("Build and run in TensorRT-LLM")
    assert before.endswith('<li class="qd-todo"><span class="qd-dot"></span><span>')
    assert "not possible on this machine" in after
    done = jobview.stage_list(job("succeeded", algorithm="TensorRTLLM", result={"timings": timings}))
    assert "not possible" not in done and done.count("qd-done") == 3
