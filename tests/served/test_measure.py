"""Measuring a served model: what is counted, what is sent, and what makes a measurement impossible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.cli import main
from backend.errors import ConfigError, EngineError
from backend.evaluate.stats import median_interval
from backend.served.measure import ServedSpeed, measure_served
from tests.served.server import MODEL, ModelServer

QUICK = ServedSpeed(prompt_tokens=20, new_tokens=6, warmup=1, repetitions=3, concurrency=3)


def test_medians_of_real_requests_with_their_intervals(server: ModelServer) -> None:
    seen: list[tuple[int, int]] = []
    metrics = measure_served(server.url, MODEL, QUICK, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]
    assert [(metric["metric"], metric["unit"], metric["protocol"]["concurrency"]) for metric in metrics] == [
        ("time to first token", "s", 1), ("tokens/s", "tokens/s", 1),
        ("time to first token", "s", 3), ("tokens/s", "tokens/s", 3),
    ]  # fmt: skip
    for metric in metrics:
        assert len(metric["samples"]) == 3 and metric["value"] == sorted(metric["samples"])[1] > 0
        low, high, confidence = median_interval(metric["samples"])
        assert metric["spread"] == {"low": low, "high": high, "confidence": confidence}
        assert metric["higher_is_better"] == (metric["unit"] == "tokens/s")
    # each of the 6 pieces takes the server at least its pause: 5 of them lie between first and last
    assert metrics[1]["value"] < 1 / server.pause_s
    assert metrics[3]["value"] < 3 / server.pause_s


def test_prompts_have_the_wanted_length_by_the_servers_count_and_never_repeat(server: ModelServer) -> None:
    metrics = measure_served(server.url, MODEL, QUICK)
    protocol = metrics[0]["protocol"]
    _, *prompts = [request["prompt"] for request in server.requests]
    # the server counts one token per word and one more, and the probe of 64 words said so
    assert {len(prompt.split()) for prompt in prompts} == {20} and len(set(prompts)) == len(prompts) == 4 * 4
    assert protocol["prompt_tokens"] == "21" and protocol["new_tokens"] == "6"
    assert "21 tokens of random words, 6 new ones" in protocol["summary"]
    assert all(request["ignore_eos"] and request["temperature"] == 0.0 for request in server.requests)


def test_alone_only(server: ModelServer) -> None:
    settings = ServedSpeed(prompt_tokens=5, new_tokens=4, warmup=0, repetitions=3, concurrency=1)
    assert len(measure_served(server.url, MODEL, settings)) == 2
    assert len(server.requests) == 1 + 3


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no usage", "not guessed here"),
        ("one piece", r"6 tokens in 1 part"),
        ("dies", "broke off"),
        ("answer status 400", "reason of 400"),
    ],
)
def test_what_cannot_be_measured_is_refused(server: ModelServer, fault: str, said: str) -> None:
    server.fault = fault
    with pytest.raises(EngineError, match=said):
        measure_served(server.url, MODEL, QUICK)


@pytest.mark.parametrize(
    ("key", "value"), [("repetitions", 2), ("new_tokens", 1), ("concurrency", 0), ("prompt_tokens", 0), ("warmup", -1)]
)
def test_counts_out_of_bounds(server: ModelServer, key: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{key}: found {value}"):
        measure_served(server.url, MODEL, ServedSpeed(**{key: value}))
    assert server.asked == []


def test_the_command_prints_a_table_with_its_protocol_or_json(
    server: ModelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quantdeck.toml").write_text(f'[served]\nurls = ["{server.url}/v1"]\n')
    arguments = ["served", server.url, "--home", str(tmp_path), "--requests", "3", "--warmup", "0"]
    arguments += ["--concurrency", "2", "--prompt-tokens", "10", "--new-tokens", "4"]
    assert main(arguments) == 0
    head, *rows, how = capsys.readouterr().out.splitlines()
    assert "median" in head and [row.split("  ")[0] for row in rows] == [
        "Time to first token", "Decode", "Time to first token, 2 requests at once", "Output of 2 requests at once",
    ]  # fmt: skip
    assert "median of 3 repetitions after 0" in how and server.url in how and MODEL in how
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == MODEL and len(found["metrics"]) == 4
    assert main([*arguments, "--model", "other"]) == 1
    assert "does not serve 'other'" in capsys.readouterr().err


def test_the_command_asks_no_address_that_is_not_allowed(
    server: ModelServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["served", server.url, "--home", str(tmp_path)]) == 2
    assert "allowed: http://127.0.0.1:8000" in capsys.readouterr().err
    assert server.asked == []
