"""The perplexity script as a program, against a stand-in of TensorRT-LLM's API whose logits are a known function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from backend.paths import PROJECT

SCRIPT = PROJECT / "backend/tensorrt_llm/perplexity_script.py"
VOCABULARY, PADDED = 97, 128
PACKAGE = """
import json, os, torch
__version__ = "1.2.1"

class SamplingParams:
    def __init__(self, max_tokens, end_id, pad_id, return_context_logits):
        assert max_tokens == 1 and return_context_logits
        self.end_id = end_id

class Output:
    def __init__(self, logits):
        self.context_logits = logits

class LLM:
    backend = "pytorch"
    def __init__(self, model, skip_tokenizer_init, kv_cache_config, **sizes):
        assert os.path.isdir(model) and skip_tokenizer_init and kv_cache_config.enable_block_reuse is False
        told = {"backend": self.backend, "fraction": kv_cache_config.free_gpu_memory_fraction, **sizes}
        with open(os.path.join(model, "told.json"), "w") as file:
            json.dump(told, file)
        with open(os.path.join(model, "trouble.json")) as file:
            self.trouble = json.load(file)
    def generate(self, prompts, sampling):
        outputs = []
        for prompt in prompts:
            ids = torch.tensor(prompt["prompt_token_ids"], dtype=torch.float64)
            positions = torch.arange(len(ids), dtype=torch.float64)
            seen = torch.cumsum(ids, 0)  # so that each row depends on all tokens before it
            columns = torch.arange(PADDED, dtype=torch.float64)
            logits = 3 * torch.sin(0.1 * seen[:, None] + columns) + 0.01 * positions[:, None] * torch.cos(columns)
            logits[:, VOCABULARY:] = 50.0  # padding that must not count
            if self.trouble == "short":
                logits = logits[1:]
            if self.trouble == "nan":
                logits[1] = float("nan")
            outputs.append(Output(None if self.trouble == "none" else logits.float()))
        return outputs
    def shutdown(self): ...
"""
KV_CACHE = """
class KvCacheConfig:
    def __init__(self, enable_block_reuse, free_gpu_memory_fraction):
        self.enable_block_reuse, self.free_gpu_memory_fraction = enable_block_reuse, free_gpu_memory_fraction
"""
ENGINE = """
from tensorrt_llm import LLM as Torch

class LLM(Torch):
    backend = "tensorrt"
"""


def expected(tokens: list[int], counted: list[int]) -> float:
    """The summed loss in float64, by numpy and one row at a time."""
    total, columns = 0.0, np.arange(VOCABULARY, dtype=np.float64)
    for position in counted:
        at = position - 1
        row = 3 * np.sin(0.1 * sum(tokens[: at + 1]) + columns) + 0.01 * at * np.cos(columns)
        total += np.log(np.exp(row - row.max()).sum()) + row.max() - row[tokens[position]]
    return total


@pytest.fixture
def model(tmp_path: Path) -> Path:
    package = tmp_path / "site/tensorrt_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"PADDED, VOCABULARY = {PADDED}, {VOCABULARY}\n{PACKAGE}")
    (package / "llmapi.py").write_text(KV_CACHE)
    (package / "_tensorrt_engine.py").write_text(ENGINE)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCABULARY}))
    (folder / "trouble.json").write_text("null")
    return folder


def run(folder: Path, windows: list[dict[str, list[int]]], *options: str) -> subprocess.CompletedProcess[str]:
    place = folder.parent
    (place / "windows.json").write_text(json.dumps({"windows": windows}))
    command = [sys.executable, str(SCRIPT), str(place / "windows.json"), str(place / "result.json")]
    return subprocess.run(
        [*command, "--model", str(folder), *options], capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(place / "site"), "OMP_NUM_THREADS": "1"}, cwd=place,
    )  # fmt: skip


def windows() -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(3)
    long, short = (draw.integers(0, VOCABULARY, n).tolist() for n in (300, 7))
    return [{"tokens": long, "counted": list(range(130, 300))}, {"tokens": short, "counted": [1, 2, 6]}]


@pytest.mark.parametrize("backend", ["pytorch", "tensorrt"])
def test_losses_are_those_of_the_reference(model, backend):
    asked = windows()
    if backend == "tensorrt":  # an engine's own config.json
        (model / "config.json").write_text(json.dumps({"pretrained_config": {"vocab_size": VOCABULARY}}))
    done = run(model, asked, "--backend", backend, "--kv-cache-fraction", "0.3")
    assert done.returncode == 0, done.stderr
    result = json.loads((model.parent / "result.json").read_text())
    assert result["version"] == "1.2.1"
    assert [row["count"] for row in result["windows"]] == [170, 3]
    for row, window in zip(result["windows"], asked, strict=True):
        # the stand-in's logits are rounded to float32, as TensorRT-LLM's are
        assert row["nll"] == pytest.approx(expected(window["tokens"], window["counted"]), rel=1e-6)
    told = json.loads((model / "told.json").read_text())
    assert (told["backend"], told["fraction"]) == (backend, 0.3)
    if backend == "pytorch":
        assert told["max_seq_len"] == 301
        assert told["max_num_tokens"] >= 300


@pytest.mark.parametrize(("trouble", "word"), [("short", "shape"), ("nan", "not finite"), ("none", "shape None")])
def test_logits_that_are_not_those_of_the_prompt_are_refused(model, trouble, word):
    (model / "trouble.json").write_text(json.dumps(trouble))
    done = run(model, windows(), "--backend", "pytorch")
    assert done.returncode == 1
    assert word in done.stderr
    assert not (model.parent / "result.json").exists()


def test_a_model_without_the_size_of_its_vocabulary_is_refused(model):
    (model / "config.json").write_text("{}")
    done = run(model, windows(), "--backend", "pytorch")
    assert (done.returncode, "vocab_size" in done.stderr) == (1, True)
