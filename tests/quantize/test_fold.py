from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from backend.quantize.fold import Fold, apply_fold, find_fold, verify
from backend.quantize.groups import GroupWatcher, InputGroup
from tests.quantize.tiny import config, tokens

EXPECTED = [
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), None),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), None),
]


def model_and_groups(kind: str, **changes: object) -> tuple[nn.Module, list[InputGroup]]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **changes), dtype=torch.float64).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.normal_(1.0, 0.3)
        with GroupWatcher(model.model.layers[0]) as watcher:
            model(tokens(1, 8))
    return model, watcher.groups()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_groups_are_found_by_what_receives_the_same_tensor(kind: str) -> None:
    _, groups = model_and_groups(kind)
    assert [(g.linears, g.norm) for g in groups] == EXPECTED


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_folding_changes_no_output(kind: str, kv_heads: int, which: int) -> None:
    """float64: any scale, at any place, leaves the logits alone; with norms rounded to float16, too."""
    model, groups = model_and_groups(kind, num_key_value_heads=kv_heads)
    ids = tokens(2, 12)
    layer = model.model.layers[0]
    fold = find_fold(layer, groups[which])
    assert fold is not None
    with torch.no_grad():
        # What is stored unfolded is rounded as well; fold on top of already rounded norms.
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = layer.get_submodule(name).weight
            norm.copy_(norm.half())
        before = model(ids).logits
        old = copy.deepcopy(layer.state_dict())
        columns = apply_fold(layer, fold, torch.empty(fold.width, dtype=torch.float64).log_normal_(), torch.float16)
        after = model(ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)  # LlamaRMSNorm computes in float32
    assert columns.shape == (layer.get_submodule(fold.consumers[0]).in_features,)
    changed = {n for n, t in layer.state_dict().items() if not torch.equal(t, old[n])}
    bias = {f"{fold.producer}.bias"} & set(old)
    assert changed == {f"{n}.weight" for n in fold.consumers} | {f"{fold.producer}.weight"} | bias


def test_query_heads_that_share_a_value_head_share_its_scales() -> None:
    model, groups = model_and_groups("llama", num_key_value_heads=2)
    fold = find_fold(model.model.layers[0], groups[1])
    assert fold is not None
    assert fold.width == 32
    channels = fold.channels.view(4, 16)  # (query head, head_dim)
    assert torch.equal(channels[0], channels[1])
    assert torch.equal(channels[2], channels[3])
    assert channels[2, 0] == 16


def test_norm_weights_that_vanish_in_float16_are_left_alone() -> None:
    model, groups = model_and_groups("llama")
    layer = model.model.layers[0]
    fold = find_fold(layer, groups[0])
    assert fold is not None
    with torch.no_grad():
        norm = layer.input_layernorm.weight
        norm[0], norm[1] = 0.0, 1e-6
        columns = apply_fold(layer, fold, torch.full((64,), 1000.0, dtype=torch.float64), torch.float16)
    assert columns[0] == columns[1] == 1.0
    assert norm[0] == 0.0
    assert norm[1] == 1e-6
    assert (columns[2:] > 900).all()


class OffsetNorm(nn.Module):
    """As in Gemma: the weight is an offset from 1, so dividing it divides nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + self.weight)


class TwoBranches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.good, self.odd = nn.LayerNorm(32), OffsetNorm(32)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.a(self.good(x)) + self.b(self.odd(x))


def test_folds_that_change_the_output_are_undone_and_explained() -> None:
    torch.manual_seed(0)
    layer, x = TwoBranches(), torch.randn(3, 32)
    nn.init.normal_(layer.good.bias)
    original = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        with GroupWatcher(layer) as watcher:
            before = layer(x)
        folds = [find_fold(layer, group) for group in watcher.groups()]
        good, odd = folds
        assert good is not None
        assert odd is not None
        assert (good.producer, odd.producer) == ("good", "odd")
        scales = {f: torch.empty(32).log_normal_() for f in (good, odd)}

        def apply(fold: Fold) -> None:
            apply_fold(layer, fold, scales[fold], torch.float32)

        failed = verify([odd, good], lambda: layer(x), apply, lambda: layer.load_state_dict(original) and None, x)
        after = layer(x)
    assert list(failed) == [odd]
    assert "output changed" in failed[odd]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.b.weight, original["b.weight"])
    assert not torch.equal(layer.a.weight, original["a.weight"])


def test_no_fold_where_nothing_suitable_produced_the_input() -> None:
    layer = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
    assert find_fold(layer, InputGroup(("2",), None)) is None
    layer = nn.Module()
    layer.v_proj, layer.o_proj = nn.Linear(32, 24), nn.Linear(32, 32)  # 24 rows cannot feed 32 columns
    assert find_fold(layer, InputGroup(("o_proj",), None)) is None


def test_folding_leaves_a_loaded_model_alone(tmp_path: Path) -> None:
    """The watcher removes its hooks."""
    model, _ = model_and_groups("llama")
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
