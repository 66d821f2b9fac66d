"""Refinement against float64: exhaustive search of steps and codes, and energies from the error itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.gptq import factorize, feed_back
from backend.quantize.grid import Grid
from backend.quantize.refine import _fit_step, refine

WIDTH = 288  # more than two blocks, no multiple of one
GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4) for size, symmetric in ((32, False), (-1, True))]


def damped_gram(width: int = WIDTH, seed: int = 0) -> Tensor:
    """Of correlated inputs with a few loud channels, damped, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    x = (torch.randn(2 * width, width, generator=generator) @ mix).double()
    x[:, ::17] *= 8.0
    H = x.T @ x  # noqa: N806
    return H + 0.01 * H.diagonal().mean() * torch.eye(width, dtype=H.dtype)


def plain(w: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    scale, zero = grid.fit(grid.grouped(w))
    q = grid.codes(grid.grouped(w), scale, zero).flatten(-2)
    return q.to(torch.uint8), scale.squeeze(-1), zero.squeeze(-1)


def energy(w: Tensor, H: Tensor, q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:  # noqa: N803
    size = w.shape[1] // scale.shape[1]
    scale, zero = (t.double().repeat_interleave(size, 1) for t in (scale, zero))
    e = (q.double() - zero) * scale - w.double()
    return ((e @ H.double()) * e).sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_rows_error_rises_with_any_sweep(grid: Grid, dtype: torch.dtype) -> None:
    H = damped_gram().to(dtype)  # noqa: N806
    w = (torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(1)) * 0.1).to(dtype)
    factor = factorize(damped_gram().to(dtype), 1e-6, True)
    assert factor is not None
    q, scale, zero = plain(w, grid)
    for start in (q, feed_back(w, factor, grid, scale, zero)[0]):
        before = energy(w, H, start, scale, zero)
        first = before
        for sweeps in (1, 2, 4):
            codes, steps = refine(w, H, grid, start, scale, zero, sweeps)
            assert codes.dtype == torch.uint8
            assert int(codes.max()) <= grid.levels
            assert torch.equal(grid.storable(steps), steps)
            after = energy(w, H, codes, steps, zero)
            assert bool((after <= before * (1 + 1e-6)).all())
            before = after
        assert before.sum() < 0.98 * first.sum()
    same, steps = refine(w, H, grid, q, scale, zero, 0)
    assert torch.equal(same, q)
    assert torch.equal(steps, scale)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_it_ends_where_no_code_and_no_step_can_be_bettered_alone(grid: Grid) -> None:
    """After many sweeps, trying every other value of each code and the neighbours of each step finds nothing."""
    width = 160
    H, w = damped_gram(width, 3), torch.randn(3, width, generator=torch.Generator().manual_seed(2)).double()  # noqa: N806
    q, scale, zero = plain(w, grid)
    q, scale = refine(w, H, grid, q, scale, zero, 60)
    least = energy(w, H, q, scale, zero)
    for j in range(width):
        for code in range(grid.levels + 1):
            other = q.clone()
            other[:, j] = code
            assert bool((energy(w, H, other, scale, zero) >= least * (1 - 1e-9)).all())
    for group in range(scale.shape[1]):
        for factor in (1 - 2**-10, 1 + 2**-10, 0.9, 1.1):
            changed = scale.clone()
            changed[:, group] = grid.storable(scale[:, group] * factor)
            assert bool((energy(w, H, q, changed, zero) >= least * (1 - 1e-9)).all())


@pytest.mark.parametrize("size", [32, 128, WIDTH])
def test_the_step_is_the_least_squares_one(size: int) -> None:
    """Against a solve of (C^T H C) ds = -C^T H e in float64, before it is rounded to what can be stored."""
    H = damped_gram()  # noqa: N806
    grid = Grid(3, -1, False, torch.bfloat16)
    generator = torch.Generator().manual_seed(4)
    offsets = torch.randint(-3, 5, (size, 6), generator=generator).double()
    offsets[:, 5] = 0  # a row without a code beside its zeros has no step of its own
    e = torch.randn(WIDTH, 6, generator=generator).double() * 0.01
    step = grid.storable(torch.full((6,), 0.1, dtype=torch.float64))
    before = step.clone()
    moves = _fit_step(H[:size, :size], grid, offsets, step, (H @ e)[:size])
    C = torch.zeros(WIDTH, 6, dtype=torch.float64)  # noqa: N806
    C[:size] = offsets
    for row in range(5):
        c = C[:, row]
        exact = float(before[row] - (c @ H @ e[:, row]) / (c @ H @ c))
        assert float(step[row]) == float(grid.storable(torch.tensor(exact, dtype=torch.float64)))
    assert step[5] == before[5]
    torch.testing.assert_close(moves, offsets * (step - before), rtol=1e-12, atol=0)


def test_rows_are_independent_and_it_repeats_itself() -> None:
    H, grid = damped_gram().float(), Grid(2, 32, False)  # noqa: N806
    w = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(5))
    q, scale, zero = plain(w, grid)
    whole = refine(w, H, grid, q, scale, zero, 2)
    again = refine(w, H, grid, q, scale, zero, 2)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    some = refine(w[:4], H, grid, q[:4], scale[:4], zero[:4], 2)
    assert (some[0] == whole[0][:4]).double().mean() > 0.99  # products of other shapes add up in another order
    torch.testing.assert_close(
        energy(w[:4], H, *some, zero[:4]), energy(w[:4], H, whole[0][:4], whole[1][:4], zero[:4]), rtol=0.02, atol=0
    )
