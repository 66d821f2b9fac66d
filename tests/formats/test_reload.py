"""What we write loads through transformers and compressed-tensors, with the logits of our own reader."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from backend.formats.loader import load_model
from backend.formats.packed_int8 import PackedInt8Linear
from backend.formats.packed_linear import PackedInt4Linear
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.models import make_model, stored, tokens, write

pytest.importorskip("compressed_tensors")
BITS = (2, 3, 4, 8)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"))


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


def peers_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval().to(dtype)  # transformers leaves a renamed tensor (GPT-NeoX's embed_out) in its stored type


def dense_model(folder: Path) -> PreTrainedModel:
    """Our reader's weights, dequantized in float32, in plain Linears."""
    packed = load_model(folder, dtype=torch.float32)
    for name, module in list(packed.named_modules()):
        if isinstance(module, PackedInt4Linear | PackedInt8Linear) and not name.endswith((".high", ".low")):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias
            packed.set_submodule(name, linear)
    return packed


def check(folder: Path) -> PreTrainedModel:
    """Both readers, both paths of ours, float32 and bfloat16."""
    many, few = tokens(2, 20), tokens(1, 6)
    peer = peers_model(folder)
    ours = load_model(folder, dtype=torch.float32)
    expected = logits(peer, many)
    spread = float(expected.std())
    torch.testing.assert_close(logits(dense_model(folder), many), expected, rtol=0, atol=2e-6 * spread)
    torch.testing.assert_close(logits(ours, many), expected, rtol=0, atol=2e-6 * spread)
    torch.testing.assert_close(logits(ours, few), logits(peer, few), rtol=0, atol=1e-5 * spread)  # the kernel
    bf16 = logits(load_model(folder), few).float()
    assert (bf16 - logits(peer, few)).norm() < 0.03 * logits(peer, few).norm()
    return peer


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", BITS)
def test_every_scheme(tmp_path: Path, source: Path, bits: int, group_size: int, symmetric: bool) -> None:
    recipe = Recipe("r", Scheme("RTN", bits, group_size, symmetric))
    folder = write(source, tmp_path / "out", recipe, dtype="float16")
    peer = check(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert list(config["config_groups"]) == ["group_0"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == ["lm_head"]
    scheme = peer.model.layers[1].mlp.down_proj.quantization_scheme.weights
    assert (scheme.num_bits, scheme.symmetric) == (bits, symmetric)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {"num_key_value_heads": 4}),
        ("opt", {"tie_word_embeddings": True}),
        ("gpt_neox", {}),
    ],
)
def test_architectures(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    source = make_model(tmp_path / "source", kind, **changes)
    folder = write(source, tmp_path / "out", Recipe("r", Scheme("RTN", 4, 32)), dtype=None)
    check(folder)
    assert {t.dtype for n, t in stored(folder).items() if n.endswith("scale")} == {torch.bfloat16}


def test_mixed_schemes_and_kept_linears(tmp_path: Path, source: Path) -> None:
    overrides = (
        Override("model.layers.1.self_attn.v_proj", None),
        Override("model.layers.0.*", Scheme("RTN", 8, -1, True)),
        Override("*.down_proj", Scheme("RTN", 3, 64, False)),
    )
    recipe = Recipe("r", Scheme("RTN", 4, 32, True), overrides, keep=("lm_head", "k_proj"))
    folder = write(source, tmp_path / "out", recipe)
    peer = check(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    schemes = {
        target: (g["weights"]["num_bits"], g["weights"]["strategy"], g["weights"]["group_size"])
        for g in config["config_groups"].values()
        for target in g["targets"]
    }
    assert len(config["config_groups"]) == 3
    assert schemes["model.layers.0.self_attn.q_proj"] == (8, "channel", None)
    assert schemes["model.layers.1.mlp.down_proj"] == (3, "group", 64)
    assert schemes["model.layers.1.mlp.up_proj"] == (4, "group", 32)
    kept = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.v_proj"]
    assert sorted(config["ignore"]) == ["lm_head", *kept]
    assert not hasattr(peer.model.layers[1].self_attn.v_proj, "quantization_scheme")


def test_sizes_that_are_no_multiple_of_32(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", hidden_size=120, intermediate_size=187, head_dim=30)
    folder = write(source, tmp_path / "out", Recipe("r", Scheme("RTN", 3, -1)))
    check(folder)


def test_a_row_of_one_group_joins_the_groups_of_its_size(tmp_path: Path, source: Path) -> None:
    """Of width 128 and group size 128 nobody can tell whether it was meant per channel; one scheme is simpler."""
    folder = write(source, tmp_path / "out", Recipe("r", Scheme("RTN", 4, 128)))
    groups = json.loads((folder / "config.json").read_text())["quantization_config"]["config_groups"]
    assert [(g["weights"]["strategy"], g["weights"]["group_size"]) for g in groups.values()] == [("group", 128)]
