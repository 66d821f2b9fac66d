"""Rotary positions in TensorRT-LLM's checkpoints and in config.json for the older transformers that it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from backend.errors import ModelError
from backend.formats.trtllm_checkpoint import complete_config, complete_hf_config, rope_of
from tests.formats.modelopt_exports import make_export
from tests.quantize.models import config

LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
CHECKPOINT = {"position_embedding_type": "rope_gpt_neox", "rotary_pct": 1.0}


def config_json(folder: Path, **changes: Any) -> dict[str, Any]:
    config("llama", **changes).save_pretrained(folder)
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_modelopt_leaves_the_base_out_and_completion_puts_it_in(tmp_path: Path) -> None:
    made = make_export(tmp_path, "int8", rope_parameters=dict(LLAMA3))
    written = json.loads((made.checkpoint / "config.json").read_text())
    # The trap: without these TensorRT-LLM takes 10000 and no scaling. Where modelopt writes them, this can go.
    assert "rotary_base" not in written and "rotary_scaling" not in written
    completed = complete_config(written, json.loads((made.source / "config.json").read_text()))
    assert completed["rotary_base"] == 500000.0
    assert completed["rotary_pct"] == 1.0
    assert completed["rotary_scaling"] == {
        "type": "llama3", "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    changed = {"rotary_base", "rotary_scaling", "rotary_pct"}
    assert {k: v for k, v in completed.items() if k not in changed} == {
        k: v for k, v in written.items() if k not in changed
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 500000.0}, {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5}},
        ),
        (
            {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
            {"rope_parameters": LLAMA3},
        ),
    ],
)
def test_old_and_new_keys_say_the_same(old: dict[str, Any], new: dict[str, Any]) -> None:
    completed = complete_config(CHECKPOINT, new)
    assert complete_config(CHECKPOINT, old) == completed
    assert completed["rotary_base"] == old["rope_theta"]
    assert completed["rotary_pct"] == old.get("partial_rotary_factor", 1.0)
    assert (completed["rotary_scaling"] is None) == (old.get("rope_scaling") is None)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"rope_parameters": YARN}, "rope_type 'yarn'"),
        ({"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {}}}, "differ by layer type"),
        ({"rope_theta": 1e6, "rope_local_base_freq": 1e4}, "rope_local_base_freq 10000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear"}}, "needs factor"),
        ({"rope_theta": "500000"}, "rope_theta is '500000'"),
        ({"rope_theta": float("nan")}, "rope_theta is nan"),
        ({"rope_parameters": "default"}, "rope_parameters is 'default'"),
        ({}, "neither rope_parameters nor rope_theta"),
    ],
)
def test_what_engines_do_not_compute_is_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        complete_config(CHECKPOINT, model)


def test_a_checkpoint_of_another_model_is_refused() -> None:
    with pytest.raises(ModelError, match="rotary_base 10000.*500000"):
        complete_config({**CHECKPOINT, "rotary_base": 10000}, {"rope_theta": 500000.0})
    assert complete_config({**CHECKPOINT, "rotary_base": 500000}, {"rope_theta": 500000.0})["rotary_base"] == 500000


def test_models_without_rotary_positions_stay_as_they_are() -> None:
    checkpoint = {"position_embedding_type": "learned_absolute"}
    assert complete_config(checkpoint, {"model_type": "opt"}) == checkpoint
    assert complete_hf_config({"model_type": "opt"}) == {"model_type": "opt"}
    assert rope_of({"model_type": "opt"}) is None


@pytest.mark.parametrize("rope", [{"rope_theta": 500000.0, "rope_type": "default"}, LLAMA3, YARN])
def test_the_older_keys_beside_the_new_one_change_nothing_in_transformers(tmp_path: Path, rope: dict[str, Any]) -> None:
    written = config_json(tmp_path, rope_parameters=dict(rope))
    assert "rope_theta" not in written  # as the newest transformers writes it
    before = AutoConfig.from_pretrained(tmp_path)
    completed = complete_hf_config(written)
    assert completed["rope_theta"] == rope["rope_theta"]
    assert ("rope_scaling" in completed) == (rope["rope_type"] != "default")
    (tmp_path / "config.json").write_text(json.dumps(completed))
    after = AutoConfig.from_pretrained(tmp_path)
    assert dict(after.rope_parameters) == dict(before.rope_parameters)
    frequencies = [AutoModelForCausalLM.from_config(found).model.rotary_emb.inv_freq for found in (before, after)]
    assert torch.equal(*frequencies)


def test_the_older_keys_alone_give_the_same_frequencies(tmp_path: Path) -> None:
    completed = complete_hf_config(config_json(tmp_path, rope_parameters=dict(LLAMA3)))
    new = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb.inv_freq
    del completed["rope_parameters"]  # what transformers 4 sees
    (tmp_path / "config.json").write_text(json.dumps(completed))
    old = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).model.rotary_emb.inv_freq
    assert torch.equal(old, new)


def test_a_base_for_each_layer_type_is_left_alone() -> None:
    found = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert complete_hf_config(found) == found
