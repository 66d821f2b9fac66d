from __future__ import annotations

import pytest
import torch

from backend.formats.weight import QuantizedWeight
from backend.quantize.grid import Grid


def quantize(grid: Grid, w: torch.Tensor) -> QuantizedWeight:
    return grid.encode(w, *grid.fit(grid.grouped(w)))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("zero_point", [True, False])
def test_rounds_to_the_nearest_stored_value(bits: int, zero_point: bool) -> None:
    """Against a float64 search over all stored values of each group."""
    torch.manual_seed(0)
    grid = Grid(bits, 32, zero_point)
    w = torch.randn(6, 96)
    quantized = quantize(grid, w)
    assert int(quantized.q.max()) <= 2**bits - 1
    dense = quantized.dequantize(torch.float64)
    codes = torch.arange(2**bits, dtype=torch.float64)
    for row in range(6):
        for group in range(3):
            values = (codes - quantized.zero[row, group]) * quantized.scale[row, group].double()
            span = slice(32 * group, 32 * group + 32)
            best = (w[row, span].double()[:, None] - values).abs().amin(-1)
            found = (w[row, span].double() - dense[row, span]).abs()
            torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("zero_point", [True, False])
def test_nearest_is_what_quantize_stores(zero_point: bool) -> None:
    grid = Grid(4, 64, zero_point)
    w = torch.randn(16, 128) * torch.logspace(-3, 3, 16)[:, None]
    assert torch.equal(grid.nearest(w), quantize(grid, w).dequantize())


def test_asymmetric_grid_spans_the_group_and_holds_zero() -> None:
    grid = Grid(4, 32, True)
    w = torch.rand(4, 32) + 0.5  # all positive
    quantized = quantize(grid, w)
    assert quantized.zero.unique().tolist() == [0]
    assert quantized.q.amax().item() == 15
    w = torch.randn(4, 32)
    error = (quantize(grid, w).dequantize() - w).abs().amax(-1)
    span = w.amax(-1) - w.amin(-1)
    assert bool((error <= span / 15 * 1.02).all())  # half a step, and up to half a step more for the zero


def test_symmetric_zero_is_the_middle() -> None:
    assert quantize(Grid(4, 32, False), torch.randn(3, 64)).zero.unique().tolist() == [8]


def test_degenerate_groups_are_finite() -> None:
    w = torch.zeros(2, 32)
    w[1] = 1e-9
    for zero_point in (True, False):
        dense = quantize(Grid(4, 32, zero_point), w).dequantize()
        assert torch.isfinite(dense).all()
        assert dense[0].abs().max() == 0


def test_shrunk_ranges_clip_and_keep_their_zero() -> None:
    grid = Grid(4, 64, True)
    w = torch.linspace(-1, 2, 64).view(1, 64)
    scale, zero = grid.fit(grid.grouped(w))
    dense = grid.encode(w, grid.shrink(scale, 0.5), zero).dequantize()
    assert dense.min().item() == pytest.approx(-0.5, abs=0.01)
    assert dense.max().item() == pytest.approx(1.0, abs=0.01)
