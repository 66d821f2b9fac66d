from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from backend.errors import CheckpointError, ConfigError
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, read_headers
from backend.formats.writer import CheckpointWriter
from tests.formats.test_autoawq import random_weight
from tests.quantize.tiny import make_model


def test_single_file_with_copied_configuration(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "notes.bin").write_bytes(b"\x80")
    writer = CheckpointWriter(tmp_path / "out", source)
    writer.declare_quantization(bits=4, group_size=32, modules_to_not_convert=("lm_head",))
    writer.add("norm", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    writer.add_linear("proj", random_weight(8, 64, 32), torch.zeros(8))
    assert not (tmp_path / "out/config.json").exists()  # a folder without it is unfinished
    out = writer.finish()
    tensors = load_file(out / SINGLE_FILE)
    assert set(tensors) == {"norm", "proj.qweight", "proj.qzeros", "proj.scales", "proj.bias"}
    assert tensors["norm"].dtype == tensors["proj.bias"].dtype == torch.float16
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["version"] == "gemm"
    assert AutoConfig.from_pretrained(out).quantization_config["group_size"] == 32


def test_shards_and_index(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    writer = CheckpointWriter(tmp_path / "out", source, dtype=None, max_shard_bytes=1000)
    values = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}  # 400 bytes each
    for name, value in values.items():
        writer.add(name, value)
    out = writer.finish()
    index = json.loads((out / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert {t.name: t.file for t in read_headers(out)} == index["weight_map"]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], values[name])
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), (None, "F32")])
def test_dtype_of_other_tensors(tmp_path: Path, dtype: str | None, stored: str) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"), dtype=dtype)
    writer.add("a", torch.ones(2))
    writer.add("i", torch.ones(2, dtype=torch.int64))
    writer.add("h", torch.ones(2), source_dtype=torch.bfloat16)  # widened for computing
    found = {t.name: t.dtype for t in read_headers(writer.finish())}
    assert found == {"a": stored, "i": "I64", "h": stored if dtype else "BF16"}


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"))
    with pytest.raises(CheckpointError, match=r"norm.*9.984e\+04.*bfloat16"):
        writer.add("norm", torch.tensor([1.0, -1e5], dtype=torch.bfloat16))


def test_bad_requests(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    with pytest.raises(ConfigError, match="'MARLIN'; allowed are GEMM and GEMV"):
        CheckpointWriter(tmp_path / "out", source, version="MARLIN")
    with pytest.raises(ConfigError, match="'int8'"):
        CheckpointWriter(tmp_path / "out", source, dtype="int8")
    writer = CheckpointWriter(tmp_path / "out", source)
    writer.add("a", torch.ones(2))
    with pytest.raises(CheckpointError, match="twice"):
        writer.add("a", torch.ones(2))
