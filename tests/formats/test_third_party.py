"""Checkpoints that llm-compressor made: packed integers through our reader, the rest through transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.errors import CheckpointError, ModelError
from backend.formats import third_party
from backend.formats.loader import load_model
from backend.formats.packed_int8 import PackedInt8Linear
from backend.formats.packed_linear import PackedInt4Linear
from backend.paths import PROJECT
from tests.formats.models import make_model, tokens

llmcompressor = pytest.importorskip("llmcompressor")
KV_CACHE = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"))


def oneshot(source: Path, out: Path, recipe: list[Any], **options: Any) -> Tensor:
    """Quantize with llm-compressor; the logits that the model has in memory."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    llmcompressor.oneshot(model=model, recipe=recipe, **options)
    model.save_pretrained(out)
    with torch.no_grad():
        return model(tokens()).logits


def scheme(name: str) -> list[Any]:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(targets="Linear", scheme=name, ignore=["lm_head"])]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("W4A16", PackedInt4Linear),
        ("W4A16_ASYM", PackedInt4Linear),
        ("W3A16", PackedInt4Linear),
        ("W2A16", PackedInt4Linear),
        ("W5A16", PackedInt8Linear),
        ("W8A16", PackedInt8Linear),
    ],
)
def test_packed_integers(tmp_path: Path, source: Path, name: str, kind: type) -> None:
    oneshot(source, tmp_path / "out", scheme(name))
    ours = load_model(tmp_path / "out", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(tokens()).logits  # this unpacks them
        torch.testing.assert_close(ours(tokens()).logits, expected, rtol=0, atol=1e-5)
    count = 0
    for path, module in ours.named_modules():
        if type(module) is kind and not path.endswith((".high", ".low")):
            weight = theirs.get_submodule(path).weight
            torch.testing.assert_close(module.dequantize(), weight, rtol=1e-6, atol=1e-7)
            count += 1
    assert count == 14


@pytest.mark.parametrize("name", ["W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4A16", "MXFP4", "W4A8"])
def test_what_only_the_library_can_run(tmp_path: Path, source: Path, name: str) -> None:
    expected = oneshot(source, tmp_path / "out", scheme(name))
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, expected)
        if "FP4" in name:  # their code computes in bfloat16 or not at all
            assert load_model(tmp_path / "out", dtype=torch.float32)(tokens()).logits.dtype == torch.bfloat16


def test_quantized_kv_cache(tmp_path: Path, source: Path) -> None:
    from datasets import Dataset
    from llmcompressor.modifiers.quantization import QuantizationModifier

    rows = {"input_ids": tokens().tolist(), "attention_mask": torch.ones_like(tokens()).tolist()}
    tokenizer = AutoTokenizer.from_pretrained(PROJECT / "backend" / "demo" / "model")
    oneshot(
        source,
        tmp_path / "out",
        [QuantizationModifier(kv_cache_scheme=KV_CACHE)],
        dataset=Dataset.from_dict(rows),
        processor=tokenizer,
        num_calibration_samples=2,
        max_seq_length=20,
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["kv_cache_scheme"]["num_bits"] == 8
    model = load_model(tmp_path / "out")
    with torch.no_grad():
        plain = load_model(source)(tokens()).logits
        quantized = model(tokens()).logits
    assert not torch.equal(quantized, plain)
    assert (quantized - plain).norm() < 0.1 * plain.norm()


def test_tensors_that_the_library_would_drop(tmp_path: Path, source: Path) -> None:
    """QuIP's rotations are not loaded again: the model would run, and talk nonsense."""
    from llmcompressor.modifiers.transform import QuIPModifier

    quip = QuIPModifier(rotations=["v", "u"], transform_type="random-hadamard", targets="Linear", ignore=["lm_head"])
    oneshot(source, tmp_path / "out", [quip, *scheme("W4A16")])
    with pytest.raises(CheckpointError, match="tensors, first .*v_input.weight.*wrong weights"):
        load_model(tmp_path / "out")


def test_the_package_is_missing(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    oneshot(source, tmp_path / "out", scheme("FP8_DYNAMIC"))
    monkeypatch.setattr(third_party, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="compressed-tensors.*not installed"):
        load_model(tmp_path / "out")


def test_formats_that_the_package_does_not_know(tmp_path: Path, source: Path) -> None:
    oneshot(source, tmp_path / "out", scheme("FP8_DYNAMIC"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["format"] = "of-the-future"
    config["quantization_config"]["config_groups"]["group_0"]["format"] = "of-the-future"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="compressed-tensors cannot load .*format"):
        load_model(tmp_path / "out")
