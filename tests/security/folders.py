"""Model folders of tests, and how they are changed, allowed and asked for."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from backend.event_stream import EventWriter
from backend.paths import Home
from backend.schema import parse_yaml
from backend.settings import FILE_NAME
from tests.conftest import demo_text

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def quiet() -> EventWriter:
    return EventWriter(open(os.devnull, "w"))  # noqa: SIM115


def allow(home: Home) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / FILE_NAME).write_text("[models]\nallow_pickle = true\n")


def job(model: Path, **changes: Any) -> Any:
    return parse_yaml(demo_text(CUSTOM_MODEL_PATH=str(model), **changes)).config


NATIVE = {
    "ALGORITHM": "Native",
    "llm": {"Native": {"Q_GROUP_SIZE": 32}},
    "CALIBRATION": {"SAMPLES": 2, "SEQUENCE_LENGTH": 32},
    "EVALUATION": {"ENABLED": False},
    "BENCHMARK": {"ENABLED": False},
}
