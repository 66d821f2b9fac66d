"""The worker as the runner calls it: events on standard output, result in a file, reasons in exit codes."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.demo import TASK_NAME
from backend.evaluate.report import build_rows
from backend.evaluate.worker import evaluate
from backend.event_stream import EventWriter
from backend.paths import PROJECT
from tests.conftest import write_jsonl


def run(module: str, request: Any, folder: Path) -> tuple[int, list[dict[str, Any]], dict[str, Any] | None, str]:
    """Exit code, events, result, standard error."""
    folder.mkdir(exist_ok=True)
    (folder / "request.json").write_text(json.dumps(request))
    done = subprocess.run(
        [sys.executable, "-m", module, str(folder / "request.json"), str(folder / "result.json")],
        cwd=PROJECT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    events = [json.loads(line) for line in done.stdout.splitlines()]
    result = folder / "result.json"
    return done.returncode, events, json.loads(result.read_text()) if result.exists() else None, done.stderr


def test_two_models_make_comparable_rows(folders: tuple[Path, Path], rows: list[str], tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "eval.jsonl", [{"text": row} for row in rows])
    results: list[dict[str, Any]] = []
    for folder in folders:
        request = {
            "model_dir": str(folder),
            "device": "cpu",
            "dtype": None,
            "perplexity": {
                "text_file": str(text),
                "text_name": "words:test",
                "protocols": ["gptq_wikitext", "full_window"],
                "window": 64,
                "max_windows": 8,
            },
            "tasks": [{"name": TASK_NAME, "num_fewshot": 0, "limit": 8}],
            "batch_size": 4,
            "seed": 0,
            "samples_dir": None,
            "stage": f"evaluate {folder.name}",
        }
        if results:  # the second one without the start of a process: the same function, its events kept in memory
            results.append(evaluate(request, EventWriter(io.StringIO())))
            continue
        code, events, result, stderr = run("backend.evaluate.worker", request, tmp_path / folder.name)
        assert code == 0 and result is not None, stderr
        assert {event["stage"] for event in events} == {f"evaluate {folder.name}"}
        assert all({"t", "step", "total", "message"} <= event.keys() for event in events)
        assert events[0]["message"] == "loading the model" and events[-1]["step"] == events[-1]["total"]
        assert result["peak_rss_bytes"] > 10**8 and result["wall_s"] > 0
        assert result["decode_path"] == "bfloat16 weights"
        results.append(result)
    table = build_rows(*results)
    assert [row["metric"] for row in table] == ["perplexity"] * 3 + ["accuracy"]
    assert table[0]["interval"][0] <= table[0]["impact"] <= table[0]["interval"][1]
    assert table[0]["impact"] != 0  # the second model's weights are a little off


@pytest.mark.parametrize(
    ("change", "code", "kind", "message"),
    [
        ({"model_dir": None}, 2, "ConfigError", "lacks the key 'model_dir'"),
        ({"tasks": [{"name": "../evil"}]}, 2, "ConfigError", "not a task name"),
        ({"dtype": "int8"}, 2, "ConfigError", "is no compute dtype"),
        ({"model_dir": "/nonexistent"}, 1, "CheckpointError", "/nonexistent"),
    ],
)
def test_wrong_requests_end_with_a_reason(
    folders: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], code: int, kind: str, message: str
) -> None:
    request = {"model_dir": str(folders[0]), "perplexity": None, "tasks": []} | change
    found, events, result, _ = run(
        "backend.evaluate.worker", {key: value for key, value in request.items() if value is not None}, tmp_path
    )
    assert (found, result) == (code, None)
    assert events[-1]["stage"] == "error" and events[-1]["kind"] == kind and message in events[-1]["message"]


def test_speed_alternates_and_reports_medians(folders: tuple[Path, Path], tmp_path: Path) -> None:
    request = {
        "baseline_dir": str(folders[0]), "quantized_dir": str(folders[1]), "device": "cpu", "threads": 1,
        "prompt_tokens": 16, "new_tokens": 4, "warmup": 1, "repetitions": 3, "stage": "benchmark",
    }  # fmt: skip
    code, events, result, stderr = run("backend.evaluate.speed", request, tmp_path)
    assert code == 0 and result is not None, stderr
    order = [event["message"].split()[3] for event in events]
    assert order == ["baseline", "quantized", "quantized", "baseline"] * 2
    assert events[-1]["step"] == events[-1]["total"] == 8
    for side in ("baseline", "quantized"):
        prefill, decode, loading, running = result[side]["metrics"]
        for metric in (prefill, decode):
            assert len(metric["samples"]) == 3 and sorted(metric["samples"])[1] == metric["value"] > 0
            assert metric["spread"]["low"] <= metric["value"] <= metric["spread"]["high"]
        assert loading["value"] > 0 and running["value"] > 0
        assert prefill["protocol"]["order"].startswith("alternating")
        assert prefill["protocol"]["threads"] == 1 and prefill["protocol"]["warmup"] == 1
    table = build_rows({"metrics": []}, {"metrics": []}, speed=result)
    assert [row["metric"] for row in table] == ["tokens/s", "tokens/s", "peak memory", "peak memory"]


def test_speed_request_is_checked(folders: tuple[Path, Path], tmp_path: Path) -> None:
    request = {"baseline_dir": str(folders[0]), "quantized_dir": str(folders[1]), "repetitions": 1}
    code, events, _, _ = run("backend.evaluate.speed", request, tmp_path)
    assert code == 2 and "repetitions: 1 is too small; at least 3" in events[-1]["message"]
