"""The chat page with a served model on one side or on both, by its own handlers and a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from backend.demo import MODEL_DIR
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.jobs.stored import start
from tests.served.server import MODEL, ModelServer, model_server
from ui.chat_pair import ChatPair, chat_key, served_key
from ui.draft import TEMPLATE
from ui.pages import chat

Handlers = dict[str, Callable[..., Any]]
SAMPLING = (4, 0.0, 1.0, 0)
REQUEST = SimpleNamespace(query_params={})


@pytest.fixture
def home(tmp_path: Any, server: ModelServer) -> Home:
    (tmp_path / "quantdeck.toml").write_text(f'[served]\nurls = ["{server.url}"]\n')
    return Home.at(tmp_path)


@pytest.fixture
def opened(home: Home) -> Iterator[tuple[ChatPair, Handlers]]:
    pair = ChatPair(home)
    with gr.Blocks() as demo:
        chat.build(demo, home, pair)
    yield pair, {fn.fn.__name__: fn.fn for fn in demo.fns.values()}
    pair.unload()


def finished_job(home: Home) -> str:
    """A succeeded job whose artefact is the demo model itself."""
    store = JobStore(home)
    job = store.create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    assert start(store, job)
    assert store.update(
        job.uid, 1, artefact=str(MODEL_DIR), result={
            "model_dir": str(MODEL_DIR), "artefact": str(MODEL_DIR),
            "results": [{"name": "w4", "label": "w4", "artefact": str(MODEL_DIR), "rows": []}],
        },
    )  # fmt: skip
    assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
    return job.uid


def test_a_local_baseline_and_a_served_model_answer_one_message(
    home: Home, opened: tuple[ChatPair, Handlers], server: ModelServer
) -> None:
    (pair, page), uid = opened, finished_job(home)
    page["on_load"](REQUEST)
    assert server.asked == []  # a page that is being loaded waits for nobody
    offered = page["on_servers"]("", uid, REQUEST)
    served = served_key(server.url, MODEL)
    for listed in (offered[2], offered[3]):
        assert (f"Served model: {server.url} ({MODEL})", served) in listed.choices
    assert uid in [key for _, key in offered[3].choices] and offered[3].value == uid
    asked = len(server.asked)
    page["on_servers"]("", uid, REQUEST)
    assert len(server.asked) == asked  # what was just found is not asked for again

    assert list(page["on_load_models"](uid, served)) and pair.key == chat_key(served, uid)
    states = list(page["on_send"](uid, served, "one two three", [], *SAMPLING))
    history, said, base_head, served_head, base_pane, served_pane, *_ = states[-1]
    assert said == ""
    assert history[0]["baseline"] and history[0]["quantized"] == "three two one"
    assert base_pane[-1]["role"] == "assistant" and served_pane[-1]["content"] == "three two one"
    assert "tokens/s" in served_head and "3 tokens" in served_head and "peak memory" not in served_head
    assert "peak memory" in base_head

    server.fault = "answer status 500"
    *_, last = page["on_send"](uid, served, "again", history, *SAMPLING)
    assert "Quantized: no answer" in last[1] and "reason of 500" in last[1]
    assert last[0][-1]["baseline"] and not last[0][-1]["quantized"]


def test_two_served_models_need_no_job_and_stop_ends_both(
    home: Home, opened: tuple[ChatPair, Handlers], server: ModelServer
) -> None:
    pair, page = opened
    assert "No quantized model yet" in page["on_load"](REQUEST)[0].value
    nothing, body, *_ = page["on_servers"](None, None, REQUEST)
    assert not nothing.visible and body.visible
    served = served_key(server.url, MODEL)
    server.pause_s = 0.05
    answer = page["on_send"](served, served, "word " * 300, [], 300, *SAMPLING[1:])
    for state in answer:
        if isinstance(state[4], list) and any(row["role"] == "assistant" for row in state[4]):
            break
    page["on_stop"]()
    *_, last = answer
    assert 0 < len(last[0][0]["baseline"].split()) < 300 and len(last[0][0]["quantized"].split()) < 300
    assert pair.key == chat_key(served, served)


def test_a_server_that_does_not_answer_is_listed_with_the_reason(
    home: Home, opened: tuple[ChatPair, Handlers], server: ModelServer
) -> None:
    (_, page), uid = opened, finished_job(home)
    server.fault = "list status 500"
    offered = page["on_servers"]("", uid, REQUEST)
    assert (f"Served model: {server.url} (not reachable)", served_key(server.url, "")) in offered[3].choices
    assert "reason of 500" in offered[4].value and offered[4].visible and offered[3].value == uid
    *_, last = page["on_load_models"](uid, served_key(server.url, ""))
    assert "The models were not loaded" in last[0] and "reason of 500" in last[0]


def test_no_other_address_is_contacted_whatever_the_page_is_sent(opened: tuple[ChatPair, Handlers]) -> None:
    pair, page = opened
    with model_server() as other:
        key = served_key(other.url, MODEL)
        *_, last = page["on_load_models"](key, key)
        assert "is not an address that may be contacted" in last[0] and other.asked == [] and pair.key == ""
