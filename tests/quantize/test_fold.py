"""Moving scales into norms and Linears, on layers made for the purpose; real architectures: test_architectures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from backend.quantize.fold import Fold, apply_fold, find_fold, gain_offset, verify
from backend.quantize.groups import GroupWatcher, InputGroup
from backend.quantize.producers import FoldFinder
from tests.quantize.models import config, tokens


class Gained(nn.Module):
    """A normalisation whose gain is a function of its weight."""

    def __init__(self, gain: Callable[[Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.gain = gain
        self.weight = nn.Parameter(torch.randn(width) * 0.1 + 0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt() * self.gain(self.weight)


@pytest.mark.parametrize(
    ("gain", "offset"),
    [
        (lambda w: w, 0.0),
        (lambda w: 1 + w, 1.0),
        (lambda w: w - 1, -1.0),
        (lambda w: 1 - w, -1.0),  # the negative of w - 1
        (lambda w: w * w, None),
        (lambda w: 2 * w, 0.0),
        (lambda w: 2 * w + 1, None),
        (lambda w: w.exp(), None),
        (lambda w: w.flip(0), None),
        (lambda w: w.mean(), None),
        (lambda w: 0 * w + 1, None),
    ],
)
def test_what_a_norm_adds_to_its_weight(gain: Callable[[Tensor], Tensor], offset: float | None) -> None:
    norm = Gained(gain)
    weight = norm.weight.clone()
    assert gain_offset(norm, 32) == offset
    assert torch.equal(norm.weight, weight)
    assert gain_offset(norm, 16) is None


def test_layer_norms_keep_their_constants() -> None:
    norm = nn.LayerNorm(32)
    nn.init.normal_(norm.bias)
    assert gain_offset(norm, 32) == 0.0
    assert gain_offset(nn.LayerNorm(32, elementwise_affine=False), 32) is None


@pytest.mark.parametrize("storage", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_consumers_take_the_scale_that_rounding_left(storage: torch.dtype, offset: float) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(Gained(lambda w: offset + w), nn.Linear(32, 8))
    fold = find_fold(layer, InputGroup(("1",), "0"))
    assert fold is not None
    assert fold.offset == offset
    x, scale = torch.randn(5, 32), torch.empty(32).log_normal_(0.0, 1.5)
    with torch.no_grad():
        before = layer(x)
        gain, weight = offset + layer[0].weight, layer[1].weight.clone()
        columns = apply_fold(layer, fold, scale, storage)
        assert torch.equal(layer[0].weight.to(storage).float(), layer[0].weight)
        torch.testing.assert_close(columns * (offset + layer[0].weight), gain, rtol=1e-6, atol=0)
        torch.testing.assert_close(layer[1].weight, weight * columns)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-5)
    if storage == torch.float32:
        torch.testing.assert_close(columns, scale, rtol=1e-3, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_gains_that_vanish_in_storage_are_left_alone(offset: float) -> None:
    layer = nn.Sequential(Gained(lambda w: offset + w), nn.Linear(32, 8))
    fold = find_fold(layer, InputGroup(("1",), "0"))
    assert fold is not None
    with torch.no_grad():
        norm = layer[0].weight
        norm[0], norm[1] = 0.0 - offset, 1e-6 - offset
        norm[1] = norm[1].half()
        norm[2:] = 100.0
        first = norm[:2].clone()
        columns = apply_fold(layer, fold, torch.full((32,), 1e3), torch.float16)
    assert columns[0] == columns[1] == 1.0
    assert torch.equal(norm[:2], first)
    assert (columns[2:] > 900).all()
    assert (columns[2:] < 1100).all()


def test_only_the_rows_of_a_segment_are_divided() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(8, 12), nn.Linear(4, 8))
    rows = torch.tensor([3, 5, 10])
    fold = Fold(("1",), "0", torch.tensor([0, 1, 2, 0]), 3, rows=rows)
    old = copy.deepcopy(layer.state_dict())
    scale = torch.tensor([2.0, 4.0, 8.0])
    with torch.no_grad():
        columns = apply_fold(layer, fold, scale, torch.float16)
    divided = fold.row_scale(scale, 12)
    assert divided.tolist() == [1, 1, 1, 2, 1, 4, 1, 1, 1, 1, 8, 1]
    assert torch.equal(layer[0].weight * divided[:, None], old["0.weight"])
    assert torch.equal(layer[0].bias * divided, old["0.bias"])
    assert columns.tolist() == [2, 4, 8, 2]
    assert torch.equal(layer[1].weight, old["1.weight"] * columns)
    assert torch.equal(layer[1].bias, old["1.bias"])


class Branches(nn.Module):
    """`odd` feeds `b` and, in another way too, the output."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.odd = nn.LayerNorm(32), nn.LayerNorm(32)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        odd = self.odd(x)
        return x + self.a(self.good(x)) + self.b(odd) + odd


@pytest.mark.parametrize("order", [["odd", "good"], ["good", "odd"]])
def test_folds_that_change_the_output_are_undone_and_explained(order: list[str]) -> None:
    torch.manual_seed(0)
    layer, x = Branches(), torch.randn(3, 32)
    nn.init.normal_(layer.good.bias)
    original = copy.deepcopy(layer.state_dict())
    with torch.no_grad():
        with GroupWatcher(layer) as watcher:
            before = layer(x)
        found = [find_fold(layer, group) for group in watcher.groups()]
        folds = {fold.producer: fold for fold in found if fold is not None}
        assert folds.keys() == {"good", "odd"}
        scales = {fold: torch.empty(32).log_normal_() for fold in folds.values()}

        def apply(fold: Fold) -> None:
            apply_fold(layer, fold, scales[fold], torch.float32)

        def reset() -> None:
            layer.load_state_dict(original)

        failed = verify([folds[name] for name in order], lambda: layer(x), apply, reset, x)
        after = layer(x)
    assert list(failed) == [folds["odd"]]
    assert "output changed" in failed[folds["odd"]]
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer.b.weight, original["b.weight"])
    assert not torch.equal(layer.a.weight, original["a.weight"])


class Block(nn.Module):
    """Two Linears with something between them, and a third that reads the same as the second."""

    def __init__(self, between: Callable[[Tensor], Tensor], rows: int, columns: int) -> None:
        super().__init__()
        self.between = between
        self.up, self.down, self.also = nn.Linear(16, rows), nn.Linear(columns, 16), nn.Linear(columns, 16)

    def forward(self, x: Tensor) -> Tensor:
        made = self.between(self.up(x))
        return x + self.down(made) + self.also(made)


def search(layer: nn.Module) -> dict[tuple[str, ...], Fold | None]:
    torch.manual_seed(0)
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        with GroupWatcher(layer) as watcher:
            layer(x)
        found = FoldFinder().find(layer, watcher.groups(), lambda: layer(x))
    return {group.linears: fold for group, fold in found.items()}


GROUP = ("down", "also")


@pytest.mark.parametrize(
    ("between", "rows", "columns", "channels"),
    [
        (lambda y: y, 24, 24, list(range(24))),
        (lambda y: y.flip(-1), 24, 24, list(range(23, -1, -1))),
        (torch.relu, 40, 40, list(range(40))),
        (lambda y: nn.functional.leaky_relu(y, 0.1), 24, 24, list(range(24))),
        (lambda y: y.repeat_interleave(3, -1), 8, 24, [i // 3 for i in range(24)]),
        (lambda y: torch.cat([y, y], -1), 12, 24, [*range(12), *range(12)]),
        (lambda y: y[..., 24:] * torch.tanh(y[..., :24]), 48, 24, list(range(24))),
        (lambda y: y[..., :24] * torch.tanh(y[..., 24:]), 48, 24, list(range(24))),
        (lambda y: y.cumsum(1), 300, 300, list(range(300))),  # mixes tokens, not channels
        (lambda y: y, 1, 1, [0]),
    ],
)
def test_rows_behind_columns_are_found(
    between: Callable[[Tensor], Tensor], rows: int, columns: int, channels: list[int]
) -> None:
    torch.manual_seed(1)
    layer = Block(between, rows, columns)
    fold = search(layer)[GROUP]
    assert fold is not None
    assert fold.consumers == GROUP
    assert fold.producer == "up"
    assert fold.channels.tolist() == channels
    x = torch.randn(2, 12, 16)
    with torch.no_grad():
        before = layer(x)
        apply_fold(layer, fold, torch.empty(fold.width).log_normal_(), torch.float32)
        torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


def swap_one(y: Tensor) -> Tensor:
    """Channel 0 is read twice, channel 1 never."""
    return torch.cat([y[..., :1], y[..., :1], y[..., 2:]], -1)


def add_two(y: Tensor) -> Tensor:
    """One column is the sum of two rows."""
    return torch.cat([y[..., :1] + y[..., 1:2], y[..., 1:]], -1)


@pytest.mark.parametrize(
    "between",
    [
        torch.tanh,
        nn.functional.gelu,
        torch.square,
        lambda y: y + 1,
        lambda y: y.softmax(-1),
        lambda y: y / y.norm(dim=-1, keepdim=True),
        lambda y: torch.zeros_like(y),
        swap_one,
        add_two,
    ],
)
def test_no_rows_where_a_factor_does_not_arrive_unchanged(between: Callable[[Tensor], Tensor]) -> None:
    assert search(Block(between, 24, 24))[GROUP] is None


def test_inputs_that_nothing_in_the_layer_made_have_no_fold() -> None:
    torch.manual_seed(0)
    layer = Block(torch.relu, 24, 24)
    assert search(layer)[("up",)] is None
    lonely = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    assert search(lonely) == {("0",): None, ("2",): None}


def test_views_of_a_norms_output_belong_to_it() -> None:
    """OPT flattens batch and time before its second half; a change in place makes another tensor."""

    class Views(nn.Module):
        def __init__(self, change: Callable[[Tensor], Any]) -> None:
            super().__init__()
            self.norm, self.a, self.b, self.change = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16), change

        def forward(self, x: Tensor) -> Tensor:
            made = self.norm(x)
            first = self.a(made)
            self.change(made)
            return first + self.b(made.reshape(-1, 16)).view_as(x)

    def groups(change: Callable[[Tensor], Any]) -> list[InputGroup]:
        with torch.no_grad(), GroupWatcher(layer := Views(change)) as watcher:
            layer(torch.randn(2, 3, 16))
        return watcher.groups()

    assert groups(lambda made: None) == [InputGroup(("a", "b"), "norm")]
    assert groups(lambda made: made.mul_(2)) == [InputGroup(("a",), "norm"), InputGroup(("b",), None)]


def test_watching_leaves_a_model_alone() -> None:
    model = AutoModelForCausalLM.from_config(config())
    with torch.no_grad(), GroupWatcher(model.model.layers[0]) as watcher:
        model(tokens(1, 8))
    assert len(watcher.groups()) == 4
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
