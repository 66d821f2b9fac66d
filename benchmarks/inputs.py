"""What the quantizers get: a model folder, calibration tokens, held-out tokens.

    python -m benchmarks.inputs REQUEST.json RESULT.json

A program of its own because it needs torch and transformers (see `processes`). The request has `out_dir`,
`samples` and `length` of the calibration, `held_out` (number of sequences; 0 for none), and `shape` of a random
model or null for the built-in demo model. The result has `model_dir`, `tokens_file` and `held_out_file`, the
files being safetensors with `tokens`, int64 (samples, length).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from backend.child import run_child
from backend.demo import MODEL_DIR
from backend.evaluate.perplexity import full_windows
from backend.event_stream import EventWriter
from backend.formats.loader import load_tokenizer
from backend.schema import DEMO
from backend.sources.calibration import token_sequences
from backend.sources.texts import TextSource, read_rows
from benchmarks.random_models import write_model

HELD_OUT_LENGTH = 512


def make(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Write the files."""
    out = Path(request["out_dir"])
    out.mkdir(parents=True, exist_ok=True)
    samples, length, held_out = request["samples"], request["length"], request["held_out"]
    if request["shape"] is None:
        model, tokens, unseen = MODEL_DIR, demo_tokens(samples, length), demo_held_out(held_out)
    else:
        model = write_model(out / "model", request["shape"])
        vocabulary, generator = request["shape"]["vocab_size"], torch.Generator().manual_seed(1)
        tokens = torch.randint(0, vocabulary, (samples, length), generator=generator)
        unseen = torch.randint(0, vocabulary, (held_out, HELD_OUT_LENGTH), generator=generator)
    files = {"tokens_file": out / "calibration.safetensors", "held_out_file": out / "held_out.safetensors"}
    for file, values in zip(files.values(), (tokens, unseen), strict=True):
        save_file({"tokens": values.contiguous()}, str(file))
    return {"model_dir": str(model), **{key: str(file) for key, file in files.items()}}


def demo_tokens(samples: int, length: int) -> Tensor:
    """The first sequences of the demo's training text, made as a job makes them: int64 (samples, length)."""
    tokenizer = load_tokenizer(MODEL_DIR)

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts))["input_ids"]

    rows = read_rows(TextSource(DEMO, None, "train", ("text",)))
    return torch.tensor(token_sequences(rows, encode, samples=samples, length=length, shuffle=False, seed=0))


def demo_held_out(count: int) -> Tensor:
    """Windows spread evenly over the demo's test text, BOS in front: int64 (count, 513)."""
    rows = read_rows(TextSource(DEMO, None, "test", ("text",)))
    windows = full_windows(load_tokenizer(MODEL_DIR), rows, HELD_OUT_LENGTH).tokens
    count = min(count, len(windows))
    return windows[[i * len(windows) // count for i in range(count)]] if count else windows[:0]


if __name__ == "__main__":
    run_child(make)
