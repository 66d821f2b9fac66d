"""Baseline measurements kept for reuse: the same weights under the same request are measured once.

The key is made of contents, not of paths or times: a copied model folder hits, a changed weight or text
misses. Speed and memory are never cached; they belong to the moment in which both models were measured.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.demo import DATA_DIR, TASK_DIR, TASK_NAME
from backend.errors import CheckpointError
from backend.evaluate.metrics import versions
from backend.files import required, sha256_file, write_json

FORMAT = 1
"""Raise it when a protocol's meaning changes: older entries then no longer match."""

_MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")
_NOT_MEASURED = frozenset({"model_dir", "samples_dir", "stage", "configuration"})
"""Keys of a request that do not change its numbers."""


def model_fingerprint(model_dir: Path) -> str:
    """SHA-256 over the names and contents of a model folder's weights, configuration and tokenizer.

    Reads every byte (about a second per 1.5 GB, far less than measuring the model takes), and a second time in
    the same process only if a file's size or time has changed.

    Raises:
        CheckpointError: If the folder has no safetensors file.
    """
    files = sorted({path for pattern in _MODEL_FILES for path in model_dir.glob(pattern)})
    if not any(path.suffix == ".safetensors" for path in files):
        raise CheckpointError(f"The model folder {model_dir} has no *.safetensors file: nothing to measure.")
    return digest([(path.name, file_digest(path)) for path in files])


def file_digest(path: Path) -> str:
    """SHA-256 of a file, computed once per process for as long as its size and time stay."""
    facts = path.stat()
    return _file_digest(str(path.resolve()), facts.st_size, facts.st_mtime_ns, facts.st_ino)


@lru_cache(maxsize=4096)
def _file_digest(path: str, *_: int) -> str:
    return sha256_file(Path(path))


def evaluation_key(request: Mapping[str, Any]) -> str:
    """Key of a worker's request: model contents, text contents, protocol, device, dtype and versions."""
    asked = {key: value for key, value in request.items() if key not in _NOT_MEASURED}
    perplexity = asked.get("perplexity")
    if perplexity:
        text = file_digest(Path(required(perplexity, "text_file")))
        asked["perplexity"] = {**perplexity, "text_file": text}
    if any(task["name"] == TASK_NAME for task in asked.get("tasks") or []):
        files = sorted(path for folder in (TASK_DIR, DATA_DIR) for path in folder.rglob("*") if path.is_file())
        asked["demo"] = [(path.name, file_digest(path)) for path in files]
    return digest(
        {
            "format": FORMAT,
            "model": model_fingerprint(Path(required(request, "model_dir"))),
            "request": asked,
            "versions": versions("torch", "transformers", "tokenizers", "lm_eval", "datasets"),
        }
    )


def lookup(folder: Path, key: str) -> dict[str, Any] | None:
    """A stored result, marked `"cached": True, "cached_at": ISO date`; None if there is none that can be read."""
    try:
        entry = json.loads(_path(folder, key).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # absent or damaged: it will be measured and replaced
    if not isinstance(entry, dict) or entry.get("key") != key:
        return None
    if not isinstance(entry.get("result"), dict) or not isinstance(entry.get("stored_at"), str):
        return None
    return {**entry["result"], "cached": True, "cached_at": entry["stored_at"]}


def store(folder: Path, key: str, result: Mapping[str, Any]) -> Path:
    """Keep a result; readers see all of it or nothing. Returns the file."""
    path = _path(folder, key)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"key": key, "stored_at": now, "result": dict(result)})
    return path


def _path(folder: Path, key: str) -> Path:
    return folder / f"{key}.json"


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
