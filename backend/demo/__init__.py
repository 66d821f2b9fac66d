"""The built-in demo: a small language model and its data, both made wholly by this project.

Only paths live here, so that importing it costs nothing. `corpus.py` writes the data, `train.py` the model.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "model"
"""Plain Hugging Face folder: LlamaForCausalLM in bfloat16 safetensors, tokenizer and chat template."""

DATA_DIR = _HERE / "data"
TEXT_FILES = {split: DATA_DIR / f"{split}.jsonl" for split in ("train", "validation", "test")}
"""JSONL files with rows ``{"text": str}``; no document is in two splits."""

TASK_DIR = _HERE / "task"
"""Folder with the lm_eval task file and its questions."""

TASK_NAME = "quantdeck_demo"
