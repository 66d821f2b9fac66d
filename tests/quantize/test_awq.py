"""Scale and clip search against losses computed from the outputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.awq import RANGE_LEVELS, RANGE_STEP, quantize_weight, search_ranges, search_scale
from backend.quantize.gram import Gram
from backend.quantize.grid import Grid

GRID = Grid(4, 32, True)
WIDTH = 96


def problem(seed: int = 0, tokens: int = 300) -> tuple[Tensor, Gram, list[Tensor]]:
    """Correlated inputs with a few loud channels, and two Linears that share them."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, WIDTH) @ (torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH))
    x[:, ::17] *= 12.0
    gram = Gram(WIDTH, torch.device("cpu"))
    gram.add(x)
    return x, gram, [torch.randn(40, WIDTH) * 0.1, torch.randn(24, WIDTH) * 0.1]


def output_error(x: Tensor, w: Tensor, rounded: Tensor) -> float:
    return float((x.double() @ (rounded.double() - w.double()).T).square().sum())


def search(
    x: Tensor, gram: Gram, weights: list[Tensor], ratios: int = 20, channels: Tensor | None = None, width: int = WIDTH
):  # noqa: ANN201,E501
    channels = torch.arange(WIDTH) if channels is None else channels
    return search_scale(weights, gram.H, gram.mean_abs, GRID, ratios, channels, width)


def test_loss_is_the_error_of_the_linears_outputs() -> None:
    x, gram, weights = problem()
    choice = search(x, gram, weights)
    assert choice.scale is not None
    scaled = sum(output_error(x, w, GRID.nearest(w * choice.scale).double() / choice.scale.double()) for w in weights)
    plain = sum(output_error(x, w, GRID.nearest(w)) for w in weights)
    assert choice.energy == pytest.approx(scaled, rel=1e-4)
    assert choice.rtn_energy == pytest.approx(plain, rel=1e-4)
    assert choice.energy < 0.7 * choice.rtn_energy  # loud channels are what AWQ is for


def test_finds_the_best_of_the_autoawq_grid() -> None:
    """A direct float64 search over AutoAWQ's ratios by running the Linears finds nothing better."""
    x, gram, weights = problem(3)
    together = torch.cat(weights).double()
    groups = together.abs().view(-1, WIDTH // 32, 32)
    w_mean = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(-1, WIDTH).mean(0)
    x_mean = x.double().abs().mean(0)
    losses = []
    for i in range(20):
        s = (x_mean ** (i / 20) / (w_mean ** (1 - i / 20) + 1e-4)).clamp(min=1e-4)
        s = (s / (s.max() * s.min()).sqrt()).float()
        losses.append(sum(output_error(x, w, GRID.nearest(w * s).double() / s.double()) for w in weights))
    assert search(x, gram, weights).energy == pytest.approx(min(losses), rel=1e-3)


def test_never_worse_than_plain_rounding() -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        gram = Gram(WIDTH, torch.device("cpu"))
        gram.add(torch.randn(200, WIDTH))  # nothing to gain
        choice = search(torch.empty(0), gram, [torch.randn(32, WIDTH)])
        assert choice.energy <= choice.rtn_energy


def test_without_a_place_for_the_scale_there_is_none() -> None:
    _, gram, weights = problem()
    choice = search_scale(weights, gram.H, gram.mean_abs, GRID, 20, None, WIDTH)
    assert choice.scale is None
    assert choice.energy == choice.rtn_energy
    assert search(torch.empty(0), gram, weights, ratios=0).scale is None


def test_dead_and_shared_channels() -> None:
    x, _, weights = problem()
    x[:, 5] = 0.0
    gram = Gram(WIDTH, torch.device("cpu"))
    gram.add(x)
    channels = torch.arange(WIDTH) // 48 * 24 + torch.arange(WIDTH) % 24  # 4 heads of 24 on 2 shared ones
    choice = search(x, gram, weights, channels=channels, width=48)
    assert choice.scale is not None
    assert choice.scale.shape == (48,)
    assert torch.isfinite(choice.scale).all()
    assert (choice.scale > 0).all()


@pytest.mark.parametrize("clipping", [True, False])
@pytest.mark.parametrize("zero_point", [True, False])
def test_reported_row_energies_are_the_outputs_errors(clipping: bool, zero_point: bool) -> None:
    x, gram, (w, _) = problem()
    quantized, energy = quantize_weight(w, gram.H, Grid(4, 32, zero_point), clipping=clipping)
    error = x.double() @ (quantized.dequantize(torch.float64) - w.double()).T
    torch.testing.assert_close(energy.double(), error.square().sum(0), rtol=1e-4, atol=0)


def test_clipping_never_raises_a_rows_error_and_helps_outliers() -> None:
    x, gram, (w, _) = problem()
    w[:, 3] = 2.0  # one weight stretches every first group, on a quiet channel
    gram.H[3] *= 1e-6
    gram.H[:, 3] *= 1e-6
    _, clipped = quantize_weight(w, gram.H, GRID, clipping=True)
    _, plain = quantize_weight(w, gram.H, GRID, clipping=False)
    assert (clipped <= plain).all()
    assert clipped.sum() < 0.9 * plain.sum()


def test_ranges_minimise_each_groups_own_error() -> None:
    _, gram, (w, _) = problem(1)
    w = w[:4]
    groups = GRID.grouped(w)
    scale, zero = GRID.fit(groups)
    blocks = torch.stack([gram.H[at : at + 32, at : at + 32] for at in range(0, WIDTH, 32)])
    found = search_ranges(groups, scale, zero, blocks, GRID)
    assert found.shape == scale.shape
    for row in range(4):
        for group in range(3):
            losses = []
            for level in range(RANGE_LEVELS):
                step = (scale[row, group] * (1 - RANGE_STEP * level)).half().double()
                codes = (groups[row, group].double() / step + zero[row, group]).round().clamp(0, 15)
                e = (codes - zero[row, group]) * step - groups[row, group].double()
                losses.append(float(e @ blocks[group].double() @ e))
            best = losses.index(min(losses))
            assert found[row, group].item() == (scale[row, group] * (1 - RANGE_STEP * best)).half().item()
