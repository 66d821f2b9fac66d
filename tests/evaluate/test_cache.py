"""A stored baseline is found again by content and only by content."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from backend.errors import CheckpointError
from backend.evaluate.cache import evaluation_key, lookup, model_fingerprint, store

RESULT = {"metrics": [], "peak_rss_bytes": 1, "wall_s": 2.0}


@pytest.fixture
def request_of(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      weights")
    (tmp_path / "eval.jsonl").write_text('{"text": "a"}\n')
    return {
        "model_dir": str(folder),
        "device": "cpu",
        "dtype": None,
        "perplexity": {"text_file": str(tmp_path / "eval.jsonl"), "protocols": ["gptq_wikitext"], "window": 512},
        "tasks": [{"name": "arc_challenge", "num_fewshot": 25, "limit": None}],
        "batch_size": 8,
        "seed": 0,
    }


def test_stored_result_comes_back_dated(request_of: dict[str, Any], tmp_path: Path) -> None:
    key = evaluation_key(request_of)
    assert lookup(tmp_path / "cache", key) is None
    store(tmp_path / "cache", key, RESULT)
    found = lookup(tmp_path / "cache", key)
    assert found is not None and found["cached"] is True and found["cached_at"].startswith("20")
    assert {k: found[k] for k in RESULT} == RESULT
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [f"{key}.json"]  # no temporary files


def test_key_follows_content_not_place(request_of: dict[str, Any], tmp_path: Path) -> None:
    key = evaluation_key(request_of)
    shutil.copytree(request_of["model_dir"], tmp_path / "copy")
    shutil.copy(request_of["perplexity"]["text_file"], tmp_path / "copy.jsonl")
    moved = request_of | {"model_dir": str(tmp_path / "copy"), "samples_dir": "x", "stage": "y"}
    moved["perplexity"] = request_of["perplexity"] | {"text_file": str(tmp_path / "copy.jsonl")}
    assert evaluation_key(moved) == key


@pytest.mark.parametrize(
    "change",
    [
        {"device": "cuda"},
        {"dtype": "float32"},
        {"tasks": [{"name": "arc_challenge", "num_fewshot": 5, "limit": None}]},
        {"batch_size": 4},
        {"seed": 1},
    ],
)
def test_key_changes_with_the_request(request_of: dict[str, Any], change: dict[str, Any]) -> None:
    assert evaluation_key(request_of | change) != evaluation_key(request_of)


@pytest.mark.parametrize("name", ["model/model.safetensors", "model/tokenizer.json", "eval.jsonl"])
def test_key_changes_with_one_byte(request_of: dict[str, Any], tmp_path: Path, name: str) -> None:
    key = evaluation_key(request_of)
    path = tmp_path / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert evaluation_key(request_of) != key


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"key": "other", "result": {}}', '{"result": 3}'])
def test_damaged_entry_is_ignored_and_replaced(request_of: dict[str, Any], tmp_path: Path, damage: str) -> None:
    key = evaluation_key(request_of)
    path = store(tmp_path, key, RESULT)
    path.write_text(damage)
    assert lookup(tmp_path, key) is None
    store(tmp_path, key, RESULT)
    assert lookup(tmp_path, key) is not None


def test_entry_without_its_date_is_ignored(request_of: dict[str, Any], tmp_path: Path) -> None:
    path = store(tmp_path, "k", RESULT)
    entry = json.loads(path.read_text())
    del entry["stored_at"]
    path.write_text(json.dumps(entry))
    assert lookup(tmp_path, "k") is None


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no \\*.safetensors"):
        model_fingerprint(tmp_path)
