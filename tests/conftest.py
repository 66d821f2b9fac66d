"""What every test may use: a fresh home, a tiny model folder, short job files."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from backend.paths import PROJECT, Home
from backend.schema import new_document

# Pages ask the Hub what a named model is; in tests nobody answers, unless a test serves one on loopback.
os.environ.setdefault("HF_ENDPOINT", "http://127.0.0.1:9")

EXAMPLES = PROJECT / "examples"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Imports of all tests at once; what they leave is not looked through again by every later garbage collection."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes (browsers, whole jobs) begin first: none is left for one worker at the end."""
    slow = {item.path for item in items if any(map(item.get_closest_marker, ("browser", "timeout")))}
    items.sort(key=lambda item: item.path not in slow)


def _restored_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


# A stage's program sets variables for itself; a test that calls one in this process must not set them for the next.
environment_of_a_module = pytest.fixture(scope="module", autouse=True)(_restored_environment)
environment_of_a_test = pytest.fixture(autouse=True)(_restored_environment)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """An empty home."""
    return Home(tmp_path / "home")


@pytest.fixture
def guide_text() -> str:
    """The AWQ guide's YAML, byte for byte."""
    return (EXAMPLES / "awq_guide.yaml").read_text(encoding="utf-8")


def demo_text(job_id: str = "demo", **changes: object) -> str:
    """A job file for the demo model that is quick: little calibration, few windows and questions."""
    values: dict[str, object] = {
        "MODEL": "quantdeck/demo",
        "DATASET_NAME": "quantdeck/demo",
        "TEXT_COLUMN": "text",
        "SPLIT": "train",
        "llm": {"AutoAWQ": {"ZERO_POINT": True, "W_BIT": 4, "Q_GROUP_SIZE": 128, "VERSION": "GEMM"}},
        "CUDA_ID": "0",
        "ALGORITHM": "AutoAWQ",
        "JOB_SERVICE": "Kompress",
        "USER_FOLDER": "user_data",
        "JOB_ID": job_id,
        "TASK": "llm",
        "CALIBRATION": {"SAMPLES": 8, "SEQUENCE_LENGTH": 128},
        "EVALUATION": {"MAX_WINDOWS": 4, "TASKS": ["quantdeck_demo:0:20"]},
        "BENCHMARK": {"PROMPT_TOKENS": 16, "NEW_TOKENS": 8, "WARMUP": 1, "REPETITIONS": 3},
    }
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            values[key] = {**values[key], **value}  # type: ignore[dict-item]
        elif value is None:
            values.pop(key, None)
        else:
            values[key] = value
    return new_document(values).dump()


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
