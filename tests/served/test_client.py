"""A served model over real HTTP: its answer, sampling, stop, and every way in which a server may fail."""

from __future__ import annotations

import socket
import threading
from typing import Any

import pytest

from backend.chat.side_by_side import side_by_side
from backend.errors import ConfigError, EngineError
from backend.served.address import allowed_url, base_url
from backend.served.client import ServedModel, list_models, served_name
from backend.served.known import KnownServers
from backend.served.transport import Limits
from tests.served.server import MODEL, ModelServer, model_server

ASK = [{"role": "user", "content": "one two three four"}]
SHORT = Limits(connect_s=1.0, silence_s=0.3, total_s=5.0)


def started(server: ModelServer, limits: Limits | None = None) -> ServedModel:
    model = ServedModel(server.url, MODEL, limits)
    model.start()
    return model


def test_an_answer_streams_and_its_counts_are_the_servers(server: ModelServer) -> None:
    model = started(server)
    path = f"{MODEL} served by {server.url}"
    assert model.alive and model.info == {"served": server.url, "model": MODEL, "decode_path": path}
    *parts, last = model.generate(ASK, max_new_tokens=16, temperature=0.7, top_p=0.9, seed=5)
    texts = [state["text"] for state in parts]
    assert {"four", "four three", "four three two", "four three two one"} <= set(texts)
    assert not any(state["done"] for state in parts)
    assert last["text"] == "four three two one" and last["done"] and last["finish"] == "stop"
    assert (last["prompt_tokens"], last["tokens"]) == (5, 4)
    assert last["tokens_per_s"] > 0 and last["prefill_s"] > 0
    (request,) = server.requests
    wanted = {"model": MODEL, "max_tokens": 16, "temperature": 0.7, "top_p": 0.9, "seed": 5, "messages": ASK}
    assert {key: request[key] for key in wanted} == wanted and request["stream"] is True
    assert list(model.generate(ASK, max_new_tokens=2))[-1]["finish"] == "length"


def test_without_usage_no_count_is_shown(server: ModelServer) -> None:
    server.fault = "no usage"
    *_, last = started(server).generate(ASK)
    assert last["text"] == "four three two one" and last["tokens"] == 0 and last["tokens_per_s"] is None


@pytest.mark.parametrize("fault", ["silent", "answer hangs"])
def test_stop_ends_an_answer_wherever_it_waits(server: ModelServer, fault: str) -> None:
    model = started(server)
    server.fault = fault
    timer = threading.Timer(0.3, model.stop)
    timer.start()
    *_, last = model.generate(ASK)
    assert last["done"] and last["finish"] == "cancelled"
    server.fault = ""
    assert list(model.generate(ASK))[-1]["text"] == "four three two one"


def test_leaving_an_answer_ends_the_request_at_the_server(server: ModelServer) -> None:
    model = started(server)
    server.pause_s = 0.01
    answer = model.generate([{"role": "user", "content": "word " * 2000}], max_new_tokens=2000)
    next(answer)
    with pytest.raises(EngineError, match="still answering"):
        next(model.generate(ASK))
    answer.close()  # type: ignore[attr-defined]
    assert server.left.wait(10)
    assert list(model.generate(ASK, max_new_tokens=4))[-1]["done"]


FAULTS = {
    "answer status 401": r"answers 401 .*reason of 401.*asks for a key",
    "answer status 404": r"answers 404 .*reason of 404",
    "answer status 500": r"answers 500 .*reason of 500",
    "answer hangs": r"silent for 0.3 s",
    "silent": r"silent for 0.3 s",
    "dies": r"broke off",
    "ends": r"without \[DONE\]",
    "error event": r"broke off its answer: CUDA out of memory",
    "garbage": r"no valid JSON \(it begins '\{not json'\)",
    "endless line": r"line of more than 1048576",
    "answer html": r"sent text/html instead of text/event-stream",
    "answer other json": r"sent application/json instead",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_failure_of_an_answer_is_named_and_the_next_one_works(server: ModelServer, fault: str) -> None:
    model = started(server, SHORT)
    server.fault = fault
    with pytest.raises(EngineError, match=FAULTS[fault]):
        list(model.generate(ASK))
    server.fault = ""
    assert list(model.generate(ASK))[-1]["text"] == "four three two one"


def test_an_answer_that_never_ends_is_cut(server: ModelServer) -> None:
    server.pause_s = 0.02
    limits = Limits(connect_s=1.0, silence_s=1.0, total_s=0.5)
    with pytest.raises(EngineError, match="within 0.5 s"):
        list(started(server, limits).generate([{"role": "user", "content": "word " * 500}], max_new_tokens=500))


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("list status 404", "answers 404"),
        ("list status 500", "reason of 500"),
        ("list html", "sent text/html instead of application/json"),
        ("list other json", "no list `data`"),
        ("list large", "more than 4194304 bytes"),
        ("list packed", "packs its answer"),
        ("list hangs", "silent for 0.3 s"),
    ],
)
def test_what_is_no_model_server_is_told_so(server: ModelServer, fault: str, said: str) -> None:
    server.fault = fault
    with pytest.raises(EngineError, match=said):
        list_models(server.url, Limits(silence_s=0.3, answer_bytes=4 * 1024**2))


@pytest.mark.parametrize("what", ["list", "answer"])
def test_redirects_are_not_followed(server: ModelServer, what: str) -> None:
    with model_server() as other:
        model = started(server)
        server.fault, server.elsewhere = f"{what} redirects", f"{other.url}/v1/models"
        with pytest.raises(EngineError, match=f"redirects to {other.url}/v1/models, which is not followed"):
            list_models(server.url) if what == "list" else list(model.generate(ASK))
        assert other.asked == []


def test_proxies_of_the_environment_are_not_used(server: ModelServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with model_server() as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("NO_PROXY", raising=False)
        assert list_models(server.url) == (MODEL,)
        assert proxy.asked == []


def nobody() -> str:
    """An address where nothing listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


def test_a_server_that_is_not_there_says_what_to_start() -> None:
    with pytest.raises(EngineError, match=r"Nothing answers at .*trtllm-serve MODEL"):
        ServedModel(nobody(), MODEL).start()


def test_which_model_is_meant(server: ModelServer) -> None:
    assert served_name(server.url, "") == MODEL
    with pytest.raises(EngineError, match="does not serve 'other'; it has org/tiny"):
        served_name(server.url, "other")
    server.models = ["a", "b"]
    with pytest.raises(EngineError, match="several models and none was named; it has a, b"):
        served_name(server.url, "")
    model = ServedModel(server.url)
    with pytest.raises(EngineError, match="none was named"):
        model.start()
    server.models = ["bad\x1bname", 5, "b"]
    model.start()
    assert model.model == "b"
    server.models = []
    with pytest.raises(EngineError, match="serves no model"):
        served_name(server.url, "")


def test_known_servers_are_asked_seldom(server: ModelServer) -> None:
    known, urls = KnownServers(), [server.url, nobody()]
    assert known.found == ()
    here, gone = known.look(urls)
    assert here.models == (MODEL,) and "Nothing answers" in gone.reason and not gone.models
    assert known.look(urls) == known.found == (here, gone) and len(server.asked) == 1
    known.look(urls, fresh_s=0.0)
    known.look(urls[:1])
    assert len(server.asked) == 3 and len(known.found) == 1


def test_two_served_models_answer_side_by_side_and_one_may_fail(server: ModelServer) -> None:
    with model_server() as other:
        a, b = started(server), started(other)
        *_, (first, second) = side_by_side(a, b, ASK, ASK, max_new_tokens=8)
        assert first["text"] == second["text"] == "four three two one"
        other.fault = "dies"
        *_, (first, second) = side_by_side(a, b, ASK, ASK, max_new_tokens=8)
        assert first["finish"] == "stop" and "error" not in first
        assert second["done"] and "broke off" in second["error"] and second["text"] == "four three"


@pytest.mark.parametrize(
    ("text", "base"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000"),
        ("https://GPU.example.org/llm/v1", "https://gpu.example.org/llm"),
        ("http://[::1]:8000/", "http://[::1]:8000"),
    ],
)
def test_one_address_has_one_form(text: str, base: str) -> None:
    assert base_url(text) == base
    assert allowed_url(text, (base,)) == base


@pytest.mark.parametrize(
    "text",
    ["", "127.0.0.1:8000", "ftp://h", "file:///etc/passwd", "http://", "http://u:p@h", "http://h:0", "http://h:99999",
     "http://h/?q", "http://h/#x", "http://h\\@e", "http://h /", "http://h\n", "http://[::1"],
)  # fmt: skip
def test_what_is_no_base_url_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="without a user, password or query"):
        base_url(text)


@pytest.mark.parametrize("text", ["http://127.0.0.1:8001", "http://localhost:8000", "http://169.254.169.254", "x"])
def test_only_allowed_addresses(text: str) -> None:
    allowed: tuple[Any, ...] = ("http://127.0.0.1:8000",)
    with pytest.raises(ConfigError, match="URL: "):
        allowed_url(text, allowed)
