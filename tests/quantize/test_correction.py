"""Corrected targets against least squares in float64, and what they do to a layer's output."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend.quantize import pipeline
from backend.quantize.correction import RIDGES, corrected
from backend.quantize.layer import LayerJob
from backend.quantize.recipe import Recipe
from tests.quantize.tiny import logits, make_model, quantize, recipe


def moved_inputs(tokens: int = 400, width: int = 48) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    x[:, ::7] *= 6
    noise = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return x, x + 0.3 * noise @ torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5


@pytest.mark.parametrize("scaled", [False, True])
def test_it_is_the_ridge_regression_on_the_moved_input(scaled: bool) -> None:
    x, moved = moved_inputs()
    width, damp = x.shape[1], 0.01
    w = torch.randn(8, width, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    H, drift = moved.T @ moved, (x - moved).T @ moved  # noqa: N806
    found = corrected(w, H, drift, damp, None)
    # Rows of sqrt(ridge) appended to X' ask for W itself.
    ridge = (damp * H.diagonal().mean()).sqrt() * torch.eye(width, dtype=torch.float64)
    expected = torch.linalg.lstsq(torch.cat([moved, ridge]), torch.cat([x @ w.T, ridge @ w.T])).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    before, after = ((moved @ v.T - x @ w.T).square().sum(0) for v in (w, found))
    assert bool((after < 0.9 * before).all())
    if scaled:
        columns = torch.empty(width, dtype=torch.float64).log_normal_(0, 1, generator=torch.Generator().manual_seed(2))
        of_scaled = corrected(w * columns, *(m / columns / columns[:, None] for m in (H, drift)), damp, columns)
        torch.testing.assert_close(of_scaled / columns, found, rtol=1e-8, atol=1e-10)


def test_it_stays_where_nothing_moves_or_nothing_is_known() -> None:
    w = torch.randn(4, 6)
    H = torch.eye(6)  # noqa: N806
    assert corrected(w, H, torch.zeros(6, 6), 0.01, None) is w
    assert corrected(w, -H, torch.ones(6, 6), 0.01, None) is w
    assert corrected(w, H * float("nan"), torch.ones(6, 6), 0.01, None) is w
    few = torch.zeros(6, 6)
    few[0, 0] = 1.0  # one input was ever seen: the others keep their weights
    found = corrected(w, few, 0.5 * few, 0.01, None)
    assert torch.equal(found[:, 1:], w[:, 1:])
    assert not torch.equal(found[:, 0], w[:, 0])


@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "phi3"])
def test_targets_are_those_of_running_the_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Every corrected weight is the float64 regression on inputs caught while running layers of whole models."""
    source = make_model(tmp_path / "source", kind, num_hidden_layers=2)
    seen: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
    correct = LayerJob._correct

    def spy(job: LayerJob, site, drift, quantized) -> None:  # type: ignore[no-untyped-def]
        original = {n: job.layer.get_submodule(n).weight.detach().clone() for n in site.linears}
        kept = {n: p.detach().clone() for n, p in job.layer.named_parameters()}
        correct(job, site, drift, quantized)
        inputs: list[Tensor] = []
        handle = job.layer.get_submodule(site.linears[0]).register_forward_pre_hook(
            lambda module, args: inputs.append(args[0].flatten(0, -2).double())
        )
        for weights in (drift._exact, drift._exact | {f"{n}.weight": w.dequantize() for n, w in quantized.items()}):
            for hidden, _ in job.stream.sample:
                call = job.stream.call(job.index, hidden)
                torch.func.functional_call(job.layer, weights, (hidden, *call.args), call.kwargs)
        handle.remove()
        half = len(inputs) // 2
        exact, moved = torch.cat(inputs[:half]), torch.cat(inputs[half:])
        for name in site.linears:
            seen[name] = (original[name], job.layer.get_submodule(name).weight.detach().clone(), exact, moved)
        others = set(kept) - {f"{n}.weight" for n in site.linears}
        now = dict(job.layer.named_parameters())
        assert all(torch.equal(kept[n], now[n]) for n in others)

    monkeypatch.setattr(LayerJob, "_correct", spy)
    many = torch.randint(3, 96, (32, 24), generator=torch.Generator().manual_seed(9))
    quantize(source, tmp_path / "out", recipe("AWQ+GPTQ", 2, scale_grid=0), "compressed-tensors", tokens=many)
    assert len(seen) >= 2
    moved_somewhere = False
    for name, (w, found, exact, moved) in seen.items():
        H, step = moved.T @ moved, (found - w).double()  # noqa: N806
        eye = torch.eye(len(H), dtype=H.dtype)
        allowed = [torch.zeros_like(step)]  # nothing is gained
        for ridge in RIDGES:
            damped = H + 0.01 * ridge * H.diagonal().mean() * eye
            allowed.append(torch.linalg.solve(damped, ((exact - moved).T @ moved).T @ w.double().T).T)
        nearest = min(float((step - other).norm()) for other in allowed)
        assert nearest <= 2e-3 * float(allowed[1].norm()) + 1e-5, name
        moved_somewhere |= bool(step.any())
    assert moved_somewhere


def test_inputs_that_cannot_be_made_up_for_are_left_alone(tmp_path: Path) -> None:
    """With fewer tokens than inputs a regression explains everything it saw and nothing else; the judges notice."""
    source = make_model(tmp_path / "source")
    exact = logits(source)
    error: dict[str, float] = {}
    few = torch.randint(3, 96, (2, 20), generator=torch.Generator().manual_seed(9))
    for name, options in (("plain", {"correct": False}), ("corrected", {"correct": True})):
        asked: Recipe = recipe("AWQ+GPTQ", 3, refine=0, scale_grid=0, name=name, **options)
        quantize(source, tmp_path / name, asked, "compressed-tensors", tokens=few)
        error[name] = float((logits(tmp_path / name) - exact).norm())
    assert error["corrected"] < 1.05 * error["plain"]


def test_a_corrected_model_is_nearer_to_the_original(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    exact = logits(source)
    error: dict[str, float] = {}
    many = torch.randint(3, 96, (64, 24), generator=torch.Generator().manual_seed(9))
    for name, options in (("plain", {"correct": False}), ("corrected", {"correct": True})):
        asked: Recipe = recipe("AWQ+GPTQ", 2, refine=0, scale_grid=0, name=name, **options)
        quantize(source, tmp_path / name, asked, "compressed-tensors", tokens=many)
        error[name] = float((logits(tmp_path / name) - exact).norm())
    assert error["corrected"] < 0.95 * error["plain"]


def test_only_recipes_that_combine_keep_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    class Stream(pipeline.LayerStream):
        def __init__(self, *args, keep: int = 0, **options) -> None:  # type: ignore[no-untyped-def]
            kept.append(keep)
            super().__init__(*args, keep=keep, **options)

    monkeypatch.setattr(pipeline, "LayerStream", Stream)
    source = make_model(tmp_path / "source", num_hidden_layers=1)
    for number, asked in enumerate((recipe("GPTQ"), recipe("AWQ+GPTQ", correct=False), recipe("AWQ+GPTQ"))):
        quantize(source, tmp_path / str(number), asked)
    assert kept[0] == kept[1] == 0 < kept[2]
