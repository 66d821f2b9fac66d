"""Training one layer: what is minimised, what is kept, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from backend.quantize.aqlm.block_data import BlockData
from backend.quantize.aqlm.block_finetune import finetune
from backend.quantize.aqlm.search import fit
from backend.quantize.aqlm.trained_linear import TrainedLinear
from backend.quantize.check import checked_architecture
from backend.quantize.stream import LayerStream, assign
from backend.quantize.weights import WeightFiles
from tests.quantize.aqlm.tiny import FINETUNE, SCHEME, SEARCH
from tests.quantize.models import make_model, tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "qwen2", num_hidden_layers=1)


@contextmanager
def block(
    source: Path,
    *,
    samples: int = 16,
    held_out: int = 4,
    lengths: Tensor | None = None,
    microbatch: int = 2,
    dtype: torch.dtype = torch.float32,
    recompute: bool = False,
) -> Iterator[tuple[nn.Module, BlockData]]:
    """A layer whose Linears are rounded to codebooks, and what it should answer."""
    with torch.no_grad():
        stream = LayerStream(
            checked_architecture(source, dtype), WeightFiles(source), tokens(samples), lengths, CPU, dtype,
            microbatch=microbatch, held_out=held_out,
        )  # fmt: skip
        with stream.layer(0) as layer:
            data = BlockData(stream, 0, stream.store("targets"))
            for number in (*data.training, *data.held_out):
                data.record(layer, number)
            assign(layer, stream.read(0, [name for name, _ in layer.named_parameters()], torch.float32))
            dense = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
            for name, linear in dense.items():
                found = fit(linear.weight, torch.eye(linear.in_features), SCHEME, SEARCH, seed=0)
                layer.set_submodule(name, TrainedLinear(found.weight, linear.bias, recompute=recompute))
            yield layer, data
            for name, linear in dense.items():
                layer.set_submodule(name, linear)


def values(layer: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def test_the_best_epoch_is_kept(source: Path) -> None:
    with block(source) as (layer, data):
        before = data.relative_error(layer, data.held_out)
        result = finetune(layer, data, replace(FINETUNE, max_epochs=8, lr=2e-3), seed=1)
        assert result.notes == ()
        assert result.validation[0] == before
        assert len(result.validation) <= 9
        assert result.validation[result.best_epoch] == min(result.validation) < 0.9 * before
        assert data.relative_error(layer, data.held_out) == min(result.validation)
        assert all(not p.requires_grad and p.grad is None for p in layer.parameters())


def test_all_but_codes_learn(source: Path) -> None:
    with block(source) as (layer, data):
        before = values(layer)
        finetune(layer, data, FINETUNE, seed=1)
        same = [name for name, value in values(layer).items() if torch.equal(value, before[name])]
        assert {name.rsplit(".", 1)[1] for name in before} == {"codebooks", "scales", "bias", "weight"}
        assert same in ([], ["self_attn.k_proj.bias"])  # attention hardly depends on it


def test_it_ends_after_epochs_without_gain(source: Path) -> None:
    with block(source) as (layer, data):
        result = finetune(layer, data, replace(FINETUNE, max_epochs=50, lr=0.02, early_stop=2), seed=1)
        assert len(result.validation) - 1 == result.best_epoch + 2 < 50
        assert data.relative_error(layer, data.held_out) == min(result.validation)


@pytest.mark.parametrize("held_out", [0, 4])
def test_divergence_keeps_what_was_best(source: Path, held_out: int) -> None:
    with block(source, held_out=held_out) as (layer, data):
        before, error = values(layer), data.relative_error(layer, data.judged)
        result = finetune(layer, data, replace(FINETUNE, max_epochs=5, lr=1e30), seed=1)
        assert result.notes == ("finetuning diverged in epoch 1; the parameters after epoch 0 are kept",)
        assert result.best_epoch == 0
        assert result.validation == ((error,) if held_out else ())
        assert all(torch.equal(value, before[name]) for name, value in values(layer).items())


def test_divergence_later(source: Path) -> None:
    """Targets that are not finite from the third epoch on."""
    with block(source) as (layer, data):
        squared_error, calls = data.squared_error, [0]

        def failing(module: nn.Module, number: int) -> Tensor:
            calls[0] += 1
            per_epoch = len(data.training) + len(data.held_out)
            return squared_error(module, number) * (math.nan if calls[0] > 2 + 2 * per_epoch else 1.0)

        data.squared_error = failing  # type: ignore[method-assign]
        result = finetune(layer, data, replace(FINETUNE, max_epochs=5), seed=1)
        assert result.notes == ("finetuning diverged in epoch 3; the parameters after epoch 2 are kept",)
        assert result.best_epoch == 2
        assert len(result.validation) == 3
        data.squared_error = squared_error  # type: ignore[method-assign]
        assert data.relative_error(layer, data.held_out) == result.validation[2]


def test_without_held_out_text_the_last_epoch_is_kept(source: Path) -> None:
    with block(source, held_out=0) as (layer, data):
        before = data.relative_error(layer, data.training)
        result = finetune(layer, data, replace(FINETUNE, max_epochs=4), seed=1)
        assert (result.validation, result.best_epoch) == ((), 4)
        assert data.relative_error(layer, data.training) < 0.9 * before


def one_step(layer: nn.Module, data: BlockData, **changes: Any) -> dict[str, Tensor]:
    """Gradients of one batch, seen as the first step of plain gradient descent would take them."""
    seen: dict[str, Tensor] = {}
    step = torch.optim.Adam.step

    def keep(self: torch.optim.Adam, *rest: Any) -> Any:
        seen.update({n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None})
        return step(self, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.Adam, "step", keep)
        finetune(layer, data, replace(FINETUNE, max_epochs=1, batch_size=12, local_batch_size=None, **changes), seed=1)
    return seen


def close(found: dict[str, Tensor], expected: dict[str, Tensor], rel: float) -> bool:
    assert found.keys() == expected.keys()
    return all(float((found[n] - e).norm()) <= rel * float(e.norm()) + 1e-7 for n, e in expected.items())


@pytest.mark.parametrize("lengths", [None, [24, 3, 11, 1, 24, 11, 24, 5, 2, 24, 7, 9, 24, 2, 13, 8]])
def test_gradients_do_not_depend_on_local_batches(source: Path, lengths: list[int] | None) -> None:
    text = None if lengths is None else torch.tensor(lengths)
    found = []
    for microbatch in (1, 3, 12):
        with block(source, lengths=text, microbatch=microbatch) as (layer, data):
            found.append(one_step(layer, data))
    with block(source, lengths=text, recompute=True) as (layer, data):
        found.append(one_step(layer, data, use_checkpointing=True))
    assert all(close(gradients, found[0], 1e-4) for gradients in found[1:])


@pytest.mark.parametrize("lengths", [None, [24, 3, 11, 1, 24, 11, 24, 5, 2, 24, 7, 9, 24, 2, 13, 8]])
def test_gradients_are_those_of_the_relative_error(source: Path, lengths: list[int] | None) -> None:
    """In float64, with weights made by indexing, one sample after the other without its padding."""
    text = torch.full((16,), 24) if lengths is None else torch.tensor(lengths)
    with block(source, lengths=None if lengths is None else text) as (layer, data):
        found = one_step(layer, data)
    with block(source) as (layer, data), torch.enable_grad():
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, TrainedLinear)}
        layer.double()
        for module in linears.values():
            module.requires_grad_(True)
            module.forward = lambda x, m=module: x @ indexed(m).T + (0 if m.bias is None else m.bias)  # type: ignore
        for parameter in layer.parameters():
            parameter.requires_grad_(True)
        error, signal = torch.zeros((), dtype=torch.float64), 0.0
        for sample in range(12):
            number, row = divmod(sample, 2)
            count = int(text[sample])
            hidden = data._stream.inputs(number)[row : row + 1].double()
            target = data._targets.read(number)[row : row + 1].double()
            call = data._stream.call(0, data._stream.inputs(number))
            double = {k: _double(v) for k, v in call.kwargs.items()}
            output = layer(hidden, **double)
            output = output[0] if isinstance(output, tuple) else output
            error = error + (output - target)[:, :count].square().sum()
            signal += float((target - hidden)[:, :count].square().sum())
        (error / signal).backward()
        expected = {n: p.grad.float() for n, p in layer.named_parameters() if p.grad is not None}
        assert close(found, expected, 1e-3)


def indexed(module: TrainedLinear) -> Tensor:
    words = [module.codebooks[k][module.codes[..., k].long()] for k in range(len(module.codebooks))]
    return torch.stack(words).sum(0).flatten(1) * module.scales[:, None]


def _double(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_double(v) for v in value)
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def test_bfloat16_forward_passes_train_as_well(source: Path) -> None:
    errors = []
    for dtype in (torch.float32, torch.bfloat16):
        with block(source, dtype=dtype) as (layer, data):
            assert all(p.dtype == torch.float32 for p in layer.parameters())
            errors.append(finetune(layer, data, replace(FINETUNE, max_epochs=4), seed=1).validation)
    assert errors[1][-1] < 0.95 * errors[1][0]
    assert errors[1][-1] == pytest.approx(errors[0][-1], rel=0.05)
