from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    GPT2Config,
    MixtralConfig,
    T5Config,
)

from backend.errors import CheckpointError, ModelError
from backend.formats.headers import SINGLE_FILE
from backend.quantize.check import check_model, checked_architecture
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.quantize.models import KINDS, make_model

SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}
RECIPES = [Recipe("small", Scheme(group_size=32))]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_supported_models_pass(tmp_path: Path, kind: str, tied: bool) -> None:
    check_model(make_model(tmp_path, kind, tie_word_embeddings=tied), RECIPES)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, **SMALL), "GPT2LMHeadModel cannot.*Conv1D"),
        (MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, num_local_experts=2, **SMALL), "MixtralForCausalLM cannot.*mixture"),
        (T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=96), "encoder-decoder"),
    ],
)  # fmt: skip
def test_unsupported_architectures_are_named(tmp_path: Path, config: object, reason: str) -> None:
    auto = AutoModelForSeq2SeqLM if isinstance(config, T5Config) else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as error:
        check_model(tmp_path, RECIPES)
    assert "Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3, OPT, GPT-NeoX" in error.value.message


def edit(folder: Path, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "nonsuch"}, "nonsuch"),
        ({"model_type": None}, "no model_type"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": -64}, "cannot be built"),
        ({"rope_parameters": {"rope_type": "unheard_of", "rope_theta": 1.0}}, "unheard_of"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
    ],
)
def test_bad_configurations(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        check_model(edit(make_model(tmp_path), **changes), RECIPES)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_broken_config_json(tmp_path: Path, content: str) -> None:
    make_model(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"):
        check_model(tmp_path, RECIPES)


def test_missing_config_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        check_model(tmp_path, RECIPES)


def test_weights_and_configuration_must_fit(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.2.*in none of its files"):
        check_model(edit(folder, num_hidden_layers=3), RECIPES)
    with pytest.raises(CheckpointError, match="does not have"):
        check_model(edit(folder, num_hidden_layers=1), RECIPES)
    with pytest.raises(CheckpointError, match=r"shape \(128, 64\).*\(256, 64\)"):
        check_model(edit(folder, num_hidden_layers=2, intermediate_size=256), RECIPES)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(ModelError, match=r"model.norm.weight has dtype I8"):
        check_model(folder, RECIPES)


def change(folder: Path, rename: dict[str, str] | None = None, **more: torch.Tensor) -> Path:
    """Rename the beginnings of tensor names, and add tensors."""
    tensors = load_file(folder / SINGLE_FILE)
    for old, new in (rename or {}).items():
        tensors = {(new + n.removeprefix(old) if n.startswith(old) else n): t for n, t in tensors.items()}
    save_file(tensors | more, folder / SINGLE_FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        (
            "gpt_neox",
            [
                "gpt_neox.layers.1.attention.bias",
                "gpt_neox.layers.1.attention.masked_bias",
                "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
            ],
        ),
    ],
)
def test_tensors_that_models_compute_themselves_are_passed_over(tmp_path: Path, kind: str, names: list[str]) -> None:
    check_model(change(make_model(tmp_path, kind), **{name: torch.ones(3) for name in names}), RECIPES)
    with pytest.raises(CheckpointError, match=r"holds model.layers.0.extra, which .* does not have"):
        check_model(change(tmp_path, **{"model.layers.0.extra": torch.ones(3)}), RECIPES)


def test_a_copy_of_a_tied_head_is_no_error_and_one_of_the_two_is_enough(tmp_path: Path) -> None:
    folder = make_model(tmp_path, tie_word_embeddings=True)
    embedding = load_file(folder / SINGLE_FILE)["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding})
    assert checked_architecture(folder, torch.float32).stored == {}
    tensors = load_file(folder / SINGLE_FILE)
    del tensors["model.embed_tokens.weight"]
    save_file(tensors, folder / SINGLE_FILE)
    assert checked_architecture(folder, torch.float32).stored == {"model.embed_tokens.weight": "lm_head.weight"}
    with pytest.raises(CheckpointError, match="embed_tokens.weight .*in none of its files"):
        check_model(edit(folder, tie_word_embeddings=False), RECIPES)


def test_names_of_older_releases_are_told(tmp_path: Path) -> None:
    neox = checked_architecture(make_model(tmp_path / "neox", "gpt_neox"), torch.float32)
    assert neox.stored == {"lm_head.weight": "embed_out.weight"}
    assert neox.stored_name("lm_head.weight") == "embed_out.weight"
    body = change(make_model(tmp_path / "body", "opt"), {"model.": ""})
    stored = checked_architecture(body, torch.float32).stored
    assert stored["model.decoder.layers.1.fc1.weight"] == "decoder.layers.1.fc1.weight"
    assert len(stored) == len(load_file(body / SINGLE_FILE)) - 1  # all but the head


def test_every_recipe_must_find_something_to_do(tmp_path: Path) -> None:
    folder = make_model(tmp_path, hidden_size=64, intermediate_size=96)
    small, large = Recipe("g32", Scheme(group_size=32)), Recipe("g128", Scheme(group_size=128))
    check_model(folder, [small])
    check_model(folder, [Recipe("g64", Scheme(group_size=64))])  # down_proj alone is left out
    with pytest.raises(ModelError, match=r"'g128' would quantize no Linear.*64 inputs.*fit some.*: 32, 64, one per"):
        check_model(folder, [small, large])
    check_model(folder, [Recipe("fit", Scheme(group_size=128), misfit="fit")])
    check_model(folder, [Recipe("one", Scheme(group_size=128), (Override("*.layers.1.mlp.down_proj", small.scheme),))])
    check_model(folder, [Recipe("rows", Scheme(group_size=-1))])
    with pytest.raises(ModelError, match="'nothing'.*q_proj: its name contains 'proj', which is to be kept"):
        check_model(folder, [Recipe("nothing", small.scheme, keep=("proj",))])
