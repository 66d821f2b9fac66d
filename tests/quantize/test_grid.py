from __future__ import annotations

import pytest
import torch

from backend.formats.weight import QuantizedWeight
from backend.quantize.grid import MAX_STEP, MIN_STEP, Grid
from backend.quantize.recipe import Scheme


def quantize(grid: Grid, w: torch.Tensor) -> QuantizedWeight:
    groups = grid.grouped(w)
    scale, zero = grid.fit(groups)
    return grid.weight(grid.codes(groups, scale, zero).flatten(-2), scale.squeeze(-1), zero.squeeze(-1))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_rounds_to_the_nearest_stored_value(
    bits: int, symmetric: bool, group_size: int, scale_dtype: torch.dtype
) -> None:
    """Against a float64 search over all stored values of each group."""
    torch.manual_seed(0)
    grid = Grid(bits, group_size, symmetric, scale_dtype)
    w = torch.randn(6, 96)
    quantized = quantize(grid, w)
    assert quantized.q.dtype == quantized.zero.dtype == torch.uint8
    assert quantized.scale.dtype == scale_dtype
    assert (quantized.bits, quantized.symmetric) == (bits, symmetric)
    assert int(quantized.q.max()) <= 2**bits - 1
    assert int(quantized.zero.max()) <= 2**bits - 1
    dense = quantized.dequantize(torch.float64)
    codes = torch.arange(2**bits, dtype=torch.float64)
    size = quantized.group_size
    assert size == (96 if group_size == -1 else group_size)
    for row in range(6):
        for group in range(96 // size):
            values = (codes - quantized.zero[row, group]) * quantized.scale[row, group].double()
            span = slice(size * group, size * group + size)
            best = (w[row, span].double()[:, None] - values).abs().amin(-1)
            found = (w[row, span].double() - dense[row, span]).abs()
            torch.testing.assert_close(found, best, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [64, -1])
def test_nearest_is_what_is_stored(symmetric: bool, group_size: int) -> None:
    grid = Grid(4, group_size, symmetric)
    w = torch.randn(16, 128) * torch.logspace(-3, 3, 16)[:, None]
    assert torch.equal(grid.nearest(w), quantize(grid, w).dequantize())
    groups = grid.grouped(w)
    assert torch.equal(grid.round(groups, *grid.fit(groups)).flatten(-2), grid.nearest(w))


def test_inputs_are_left_alone() -> None:
    for symmetric in (False, True):
        grid, w = Grid(4, 32, symmetric), torch.randn(4, 64)
        before = w.clone()
        scale, zero = grid.fit(grid.grouped(w))
        kept = scale.clone(), zero.clone()
        grid.codes(grid.grouped(w), scale, zero)
        grid.round(grid.grouped(w), scale, zero)
        assert torch.equal(w, before)
        assert torch.equal(scale, kept[0])
        assert torch.equal(zero, kept[1])


def test_grouped_is_a_view() -> None:
    w = torch.randn(4, 96)
    assert Grid(4, 32, False).grouped(w).shape == (4, 3, 32)
    assert Grid(4, -1, False).grouped(w).shape == (4, 1, 96)
    assert Grid(4, 32, False).grouped(w).data_ptr() == w.data_ptr()


def test_asymmetric_grid_spans_the_group_and_holds_zero() -> None:
    grid = Grid(4, 32, False)
    w = torch.rand(4, 32) + 0.5  # all positive
    quantized = quantize(grid, w)
    assert quantized.zero.unique().tolist() == [0]
    assert quantized.q.amax().item() == 15
    negative = quantize(grid, -w)
    assert negative.zero.unique().tolist() == [15]
    assert negative.q.amin().item() == 0
    w = torch.randn(4, 32)
    error = (quantize(grid, w).dequantize() - w).abs().amax(-1)
    span = w.amax(-1) - w.amin(-1)
    assert bool((error <= span / 15 * 1.02).all())  # half a step, and up to half a step more for the zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_symmetric_zero_is_the_middle(bits: int) -> None:
    grid = Grid(bits, 32, True)
    w = torch.randn(3, 64)
    quantized = quantize(grid, w)
    assert quantized.zero.unique().tolist() == [2 ** (bits - 1)] == [grid.middle]
    assert grid.levels == 2**bits - 1
    largest = grid.grouped(w).abs().amax(-1)
    reached = quantized.scale.float() * (
        2 ** (bits - 1) - 1
    )  # the largest weight is a point of the grid, whatever its sign
    torch.testing.assert_close(reached, largest, rtol=2**-10, atol=0)
    assert int(quantized.q.min()) >= 1


def test_degenerate_groups_are_finite() -> None:
    w = torch.zeros(3, 32)
    w[1] = 1e-9
    w[2, :2] = torch.tensor([3e38, -3e38])
    for symmetric in (False, True):
        for dtype in (torch.float16, torch.bfloat16):
            quantized = quantize(Grid(4, 32, symmetric, dtype), w)
            dense = quantized.dequantize()
            assert torch.isfinite(dense).all()
            assert dense[0].abs().max() == 0


def test_steps_are_what_is_stored() -> None:
    grid = Grid(4, 32, False)
    steps = torch.tensor([0.0, 1e-9, 1 / 3, 70000.0])
    expected = [MIN_STEP, MIN_STEP, torch.tensor(1 / 3).half().item(), MAX_STEP]
    assert grid.storable(steps).tolist() == expected
    assert torch.equal(grid.storable(steps), grid.storable(grid.storable(steps)))
    assert grid.storable(steps.double()).dtype == torch.float64
    bfloat = Grid(4, 32, False, torch.bfloat16).storable(torch.tensor([1 / 3]))
    assert bfloat.item() == torch.tensor(1 / 3).bfloat16().item()


def test_of_a_scheme() -> None:
    assert Grid.of(Scheme("RTN", 3, 64, True), torch.bfloat16) == Grid(3, 64, True, torch.bfloat16)


def test_shrunk_ranges_clip_and_keep_their_zero() -> None:
    grid = Grid(4, 64, False)
    w = torch.linspace(-1, 2, 64).view(1, 64)
    groups = grid.grouped(w)
    scale, zero = grid.fit(groups)
    dense = grid.round(groups, grid.storable(scale * 0.5), zero)
    assert dense.min().item() == pytest.approx(-0.5, abs=0.01)
    assert dense.max().item() == pytest.approx(1.0, abs=0.01)
