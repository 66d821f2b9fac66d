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
    OPTConfig,
    T5Config,
)

from backend.errors import CheckpointError, ConfigError, ModelError
from backend.formats.headers import SINGLE_FILE
from backend.quantize import AwqSettings, check_model
from tests.quantize.tiny import SETTINGS, make_model

SMALL = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_supported_models_pass(tmp_path: Path, kind: str) -> None:
    check_model(make_model(tmp_path, kind), SETTINGS)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, **SMALL), "GPT2LMHeadModel cannot.*Conv1D"),
        (OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
                   **SMALL), "OPTForCausalLM cannot"),
        (MixtralConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=2, num_local_experts=2, **SMALL), "MixtralForCausalLM cannot.*mixture"),
        (T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=96), "encoder-decoder"),
    ],
)  # fmt: skip
def test_unsupported_architectures_are_named(tmp_path: Path, config: object, reason: str) -> None:
    auto = AutoModelForSeq2SeqLM if isinstance(config, T5Config) else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=reason) as error:
        check_model(tmp_path, SETTINGS)
    assert "Llama, Mistral, Qwen2, Qwen3" in error.value.message


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
        check_model(edit(make_model(tmp_path), **changes), SETTINGS)


@pytest.mark.parametrize("content", ["", "[]", "{", '"text"'])
def test_broken_config_json(tmp_path: Path, content: str) -> None:
    make_model(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"):
        check_model(tmp_path, SETTINGS)


def test_missing_config_json(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no config.json"):
        check_model(tmp_path, SETTINGS)


def test_weights_and_configuration_must_fit(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers.2.*in none of its files"):
        check_model(edit(folder, num_hidden_layers=3), SETTINGS)
    with pytest.raises(CheckpointError, match="does not have"):
        check_model(edit(folder, num_hidden_layers=1), SETTINGS)
    with pytest.raises(CheckpointError, match=r"shape \(128, 64\).*\(256, 64\)"):
        check_model(edit(folder, num_hidden_layers=2, intermediate_size=256), SETTINGS)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int8)
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(ModelError, match=r"model.norm.weight has dtype I8"):
        check_model(folder, SETTINGS)


def test_widths_that_groups_do_not_divide(tmp_path: Path) -> None:
    folder = make_model(tmp_path, hidden_size=64, intermediate_size=96)
    with pytest.raises(ModelError, match=r"down_proj has 96 inputs.*64 does not divide; use 32"):
        check_model(folder, AwqSettings(group_size=64))
    check_model(folder, AwqSettings(group_size=64, modules_to_not_convert=("lm_head", "down_proj")))


@pytest.mark.parametrize(
    ("settings", "key"), [({"bits": 3}, "bits"), ({"group_size": 96}, "group_size"), ({"scale_grid": -1}, "scale_grid")]
)
def test_settings_out_of_range(settings: dict[str, int], key: str) -> None:
    with pytest.raises(ConfigError, match="allowed|holds|or more") as error:
        AwqSettings(**settings)
    assert error.value.key == key
    assert error.value.value == settings[key]
