"""The Compare page shows published figures apart from measured ones: in tables of their own, in no chart or list."""

from __future__ import annotations

import json
from types import SimpleNamespace

import gradio as gr
import pytest

from backend.evaluate.published import CAPTION, TABLES
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.ui.many import fill
from ui.layout import esc
from ui.pages import compare


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    home = Home(tmp_path_factory.mktemp("published") / "home")
    fill(home, 2, states=("succeeded",))
    return home


def test_they_stand_in_a_part_of_their_own(home: Home) -> None:
    with gr.Blocks() as demo:
        compare.build(demo, home)
    part = next(block for block in demo.blocks.values() if block.elem_id == "compare-published")
    assert part.label == "Published reference figures"
    (shown,) = part.children
    assert esc(CAPTION) in shown.value
    assert shown.value.count("<table") == len(TABLES)
    for table in TABLES:
        assert all(esc(text) in shown.value for text in (table.heading, table.model, table.source, table.remark))
    for number in ("194.86", "143.57", "83.43", "106.84", "74.19", "7.69", "58.9", "0.728"):
        assert f'<td class="qd-num">{number}</td>' in shown.value


def test_they_are_in_no_chart_no_list_and_not_in_the_table_of_jobs(home: Home) -> None:
    with gr.Blocks() as demo:
        compare.build(demo, home)
    handlers = {fn.fn.__name__: fn.fn for fn in demo.fns.values()}
    keys = [job.uid for job in JobStore(home).jobs(limit=2)]
    _, listed = handlers["on_load"](SimpleNamespace(query_params={}))
    assert {key.partition("/")[0] for _, key in listed.choices} == set(keys)
    *parts, table = handlers["on_jobs"](keys)
    figures = [json.dumps(part.value) for part in parts if isinstance(part, gr.Plot) and part.value is not None]
    assert figures and "job-00001" in table
    for text in (table, *figures):
        assert not any(word in text for word in ("Llama-2", "TGI", "194.86", "Published"))
