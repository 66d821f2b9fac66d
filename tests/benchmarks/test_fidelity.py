"""KL and flips against their definitions, and the readers of checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backend.formats.loader import load_model
from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.weight import QuantizedWeight
from benchmarks.fidelity import _make_dense, compare, logits_of, read_dense
from benchmarks.gptq_reader import dequantize
from benchmarks.random_models import tensor_shapes, write_model
from benchmarks.shapes import MEDIUM

TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}


@pytest.fixture(scope="module")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("random") / "model", TINY)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (8, 24), generator=torch.Generator().manual_seed(0))


def test_a_model_is_not_away_from_itself(tiny_dir: Path, tokens: Tensor) -> None:
    model = read_dense(tiny_dir)
    found = compare(list(logits_of(model, tokens)), model, tokens)
    assert found == {"kl": 0.0, "kl_stderr": 0.0, "flips": 0.0, "tokens": 192}


def test_divergence_and_flips_are_those_of_the_definition(tiny_dir: Path, tokens: Tensor) -> None:
    base, other = read_dense(tiny_dir), read_dense(tiny_dir)
    with torch.no_grad():
        other.get_submodule("lm_head").weight += 0.02 * torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
        p, q = (model(input_ids=tokens).logits.double() for model in (base, other))
    exact = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    found = compare(list(logits_of(base, tokens)), other, tokens)
    assert found["kl"] == pytest.approx(float(exact.mean()), rel=1e-4)
    assert found["kl_stderr"] == pytest.approx(float(exact.mean(-1).std() / 8**0.5), rel=1e-3)
    assert found["flips"] == pytest.approx(float((p.argmax(-1) != q.argmax(-1)).double().mean()))
    assert found["flips"] > 0


def test_packed_linears_become_the_numbers_they_store() -> None:
    weight = QuantizedWeight(
        torch.randint(0, 16, (48, 64), dtype=torch.uint8),
        (torch.rand(48, 2) * 0.01 + 0.001).half(),
        torch.randint(0, 16, (48, 2), dtype=torch.uint8),
    )
    holder = nn.ModuleDict({"inner": nn.ModuleDict({"proj": PackedInt4Linear(weight, dtype=torch.float32)})})
    _make_dense(holder)
    dense = holder.get_submodule("inner.proj")
    assert isinstance(dense, nn.Linear)
    torch.testing.assert_close(dense.weight.data, weight.dequantize(), rtol=1e-6, atol=1e-8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(rows, codes) -> (rows, words), the lowest bits first."""
    per_word = 32 // bits
    parts = codes.to(torch.int64).view(len(codes), -1, per_word) << torch.arange(0, 32, bits)
    return parts.sum(-1).to(torch.int32)


def gptq_parts(q: Tensor, zero: Tensor, scale: Tensor, group: Tensor, bits: int, below: int) -> dict[str, Tensor]:
    """A Linear's tensors in the GPTQ layout; q is (out, in), zero and scale (out, groups)."""
    return {
        "qweight": pack(q, bits).T.contiguous(),
        "qzeros": pack((zero.T.to(torch.int64) - below) % (1 << bits), bits),
        "scales": scale.T.contiguous(),
        "g_idx": group.to(torch.int32),
    }


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_layout_with_reordered_inputs(bits: int, version: str) -> None:
    generator = torch.Generator().manual_seed(bits)
    q = torch.randint(0, 1 << bits, (32, 64), generator=generator)
    zero = torch.randint(0, 1 << bits, (32, 4), generator=generator)  # zero 0 wraps around in the first version
    scale = torch.rand(32, 4, generator=generator).half()
    group = torch.randperm(64, generator=generator) // 16
    parts = gptq_parts(q, zero, scale, group, bits, 1 if version == "gptq" else 0)
    expected = (q - zero[:, group]) * scale.float()[:, group]
    assert torch.equal(dequantize(parts, {"bits": bits, "checkpoint_format": version}), expected)


@pytest.mark.parametrize(
    "names", [{"quant_method": "gptq"}, {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}]
)
def test_reads_a_whole_gptq_checkpoint(tiny_dir: Path, tmp_path: Path, names: Mapping[str, str]) -> None:
    """A model whose weights lie on a grid, so that the layout can hold them exactly."""
    model, stored = load_model(tiny_dir, dtype=torch.float32), {}
    group = torch.arange(2).repeat_interleave(16)
    for name, parameter in model.named_parameters():
        if name.endswith("mlp.gate_proj.weight"):
            q = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(2))
            zero, scale = torch.full((64, 2), 7), torch.full((64, 2), 0.01).half()
            parameter.data = (q - zero[:, group]) * scale.float()[:, group]
            parts = gptq_parts(q, zero, scale, group, 4, 1)
            stored |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
        else:
            stored[name] = parameter.data
    save_file(stored, str(tmp_path / "model.safetensors"))
    config = json.loads((tiny_dir / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = {**names, "bits": 4, "group_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = dict(read_dense(tmp_path).named_parameters())
    assert all(torch.equal(read[name], parameter) for name, parameter in model.named_parameters())


def test_random_models_are_written_in_parts(tiny_dir: Path) -> None:
    files = sorted(tiny_dir.glob("*.safetensors"))
    assert len(files) == 4  # embeddings, two layers, the rest
    expected = list(tensor_shapes(TINY))
    found = [{name: tuple(tensor.shape) for name, tensor in load_file(str(file)).items()} for file in files]
    assert found == expected


def test_the_medium_model_has_the_size_it_is_known_by() -> None:
    sizes = (torch.Size(size).numel() for shapes in tensor_shapes(MEDIUM) for size in shapes.values())
    assert round(sum(sizes) / 1e6, 1) == 102.6
