"""Ranges and packs, against energies computed in float64 from the inputs themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.formats.weight import QuantizedWeight
from backend.quantize import rounding
from backend.quantize.gptq import Factor
from backend.quantize.grid import Grid
from backend.quantize.rounding import (
    GROUP_RANGES,
    ROW_RANGES,
    round_nearest,
    round_with_feedback,
    search_ranges,
)
from backend.quantize.site import Site

WIDTH = 96
GRIDS = [Grid(bits, size, symmetric) for bits in (2, 3, 4) for size, symmetric in ((32, False), (-1, True))]


def inputs(tokens: int = 300, seed: int = 0) -> Tensor:
    """Correlated, with a few loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH, generator=generator)
    x = torch.randn(tokens, WIDTH, generator=generator) @ mix
    x[:, ::17] *= 12.0
    return x


def site(x: Tensor, fast: torch.dtype = torch.float32) -> Site:
    return Site(("fc",), x.T @ x, x.abs().mean(0), None, fast)


def weights(*rows: int, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, WIDTH, generator=generator) * 0.1 for n in rows]


def energies(x: Tensor, w: Tensor, found: QuantizedWeight, columns: Tensor | None = None) -> Tensor:
    """Of each row's output error, from the outputs, float64."""
    e = found.dequantize(torch.float64) - w.double()
    return (x.double() @ (e if columns is None else e / columns.double()).T).square().sum(0)


def factor_of(s: Site) -> Factor:
    found = s.factor(0.01, True)
    assert found is not None
    return found


def same(a: QuantizedWeight, b: QuantizedWeight) -> bool:
    return torch.equal(a.q, b.q) and torch.equal(a.scale, b.scale) and torch.equal(a.zero, b.zero)


def test_without_ranges_it_is_plain_rounding() -> None:
    x, (w,) = inputs(), weights(40)
    for grid in [*GRIDS, Grid(8, 32, False)]:
        found = round_nearest(w, site(x), grid, clip=False, columns=None)
        assert torch.equal(found.dequantize(), grid.nearest(w))
        assert found.q.dtype == found.zero.dtype == torch.uint8
        assert (found.bits, found.symmetric) == (grid.bits, grid.symmetric)
    whole = round_nearest(w, site(x), Grid(8, 32, False), clip=True, columns=None)  # 8 bits: no ranges are tried
    assert torch.equal(whole.dequantize(), Grid(8, 32, False).nearest(w))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_never_raise_a_rows_error(grid: Grid) -> None:
    x, (w,) = inputs(), weights(60)
    plain = energies(x, w, round_nearest(w, site(x), grid, clip=False, columns=None))
    clipped = energies(x, w, round_nearest(w, site(x), grid, clip=True, columns=None))
    assert bool((clipped <= plain * (1 + 1e-4)).all())
    assert clipped.sum() < 0.95 * plain.sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_ranges_with_feedback_never_raise_a_rows_error(grid: Grid) -> None:
    """With the damped H, which is what feedback minimises."""
    x, (w,) = inputs(), weights(60)
    s = site(x)
    damped = torch.linalg.cholesky(s.H.double() + 0.01 * s.H.double().diagonal().mean() * torch.eye(WIDTH)).T
    full, clipped = (
        energies(damped, w, round_with_feedback([w], factor_of(s), grid, clip=clip, columns=None)[0])
        for clip in (False, True)
    )
    assert bool((clipped <= full * (1 + 1e-3)).all())
    assert bool((clipped < full).any())
    plain = energies(x, w, round_nearest(w, s, grid, clip=True, columns=None))
    assert clipped.sum() < 0.85 * plain.sum()


def test_clipping_helps_outliers_on_quiet_channels() -> None:
    x, (w,) = inputs(), weights(40)
    w[:, 3] = 2.0  # one weight stretches every first group
    x[:, 3] *= 1e-3
    grid = Grid(4, 32, False)
    plain = energies(x, w, round_nearest(w, site(x), grid, clip=False, columns=None))
    clipped = energies(x, w, round_nearest(w, site(x), grid, clip=True, columns=None))
    assert clipped.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_search_finds_each_groups_own_minimum(grid: Grid) -> None:
    x, (w,) = inputs(seed=1), weights(6)
    groups, ranges = grid.grouped(w), GROUP_RANGES[grid.bits]
    scale, zero = grid.fit(groups)
    size = groups.shape[-1]
    blocks = site(x).blocks(size, None)
    found = search_ranges(groups, scale, zero, blocks, grid, ranges)
    assert found.shape == scale.shape
    chosen = set()
    for row in range(len(w)):
        for group in range(groups.shape[1]):
            part = x[:, group * size : (group + 1) * size].double()
            losses: dict[float, float] = {}
            for share in (1.0, *ranges):
                step = (scale[row, group] * share).half().double()
                codes = (groups[row, group].double() / step).round() + zero[row, group]
                e = (codes.clamp(0, grid.levels) - zero[row, group]) * step - groups[row, group].double()
                losses[share] = float((part @ e).square().sum())
            chosen_step = found[row, group].item()
            at = {(scale[row, group] * share).half().item(): loss for share, loss in losses.items()}
            assert at[chosen_step] <= min(losses.values()) * (1 + 1e-5)
            chosen.add(min(losses, key=losses.__getitem__))
    assert len(chosen) > 1  # not one range for all


@pytest.mark.parametrize("grid", [*GRIDS, Grid(8, 32, False)], ids=str)
def test_several_weights_are_rounded_as_each_alone(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packs end inside of weights, and hold several."""
    s, many = site(inputs()), weights(40, 8, 24, 1)
    factor = factor_of(s)
    alone = [round_with_feedback([w], factor, grid, clip=True, columns=None)[0] for w in many]
    for rows in (1000, 48, 17):
        monkeypatch.setattr(rounding, "FEEDBACK_CHUNK", rows * WIDTH)
        together = round_with_feedback(many, factor, grid, clip=True, columns=None)
        assert [len(w.q) for w in together] == [40, 8, 24, 1]
        for a, b in zip(alone, together, strict=True):
            # products of other shapes add up in another order, so that a value at a tie may go the other way
            assert (a.q == b.q).double().mean() > 0.98
            assert torch.equal(a.zero, b.zero)
        x, w = inputs(), many[0]
        assert float(energies(x, w, together[0]).sum()) == pytest.approx(
            float(energies(x, w, alone[0]).sum()), rel=0.02
        )


def test_packs_hold_every_row_once() -> None:
    for counts in ([5], [3, 4], [1, 1, 1], [10, 2, 7]):
        for limit in (1, 2, 3, 5, 100):
            packs = rounding._packs(counts, limit)
            rows = [(number, row) for pack in packs for number, begin, end in pack for row in range(begin, end)]
            assert rows == [(n, row) for n, count in enumerate(counts) for row in range(count)]
            sizes = [sum(end - begin for _, begin, end in pack) for pack in packs]
            assert all(size == limit for size in sizes[:-1])
            assert 0 < sizes[-1] <= limit


def test_rows_in_chunks_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    s, (w,) = site(inputs()), weights(50)
    for grid in GRIDS:
        whole = round_nearest(w, s, grid, clip=True, columns=None)
        monkeypatch.setitem(rounding.CHUNK, "cpu", 7 * WIDTH)
        parts = round_nearest(w, s, grid, clip=True, columns=None)
        monkeypatch.undo()
        assert (whole.scale == parts.scale).double().mean() > 0.95
        assert (whole.q == parts.q).double().mean() > 0.95
        assert energies(inputs(), w, parts).sum() == pytest.approx(float(energies(inputs(), w, whole).sum()), rel=1e-3)


@pytest.mark.parametrize("grid", [*GRIDS, Grid(8, -1, False)], ids=str)
@pytest.mark.parametrize("feedback", [False, True])
def test_scaled_columns_are_those_of_the_scaled_input(grid: Grid, feedback: bool) -> None:
    """Rounding s * W with the unscaled H and `columns` = rounding s * W with the Gram matrix of x / s."""
    x, (w,) = inputs(), weights(32)
    columns = torch.empty(WIDTH).log_normal_(0, 1, generator=torch.Generator().manual_seed(2))
    columns = 2 ** columns.log2().round()  # exact in both ways
    scaled, s = w * columns, site(x)
    if feedback:
        factor = factor_of(s)
        order = factor.order
        assert order is not None
        of_scaled = Factor(factor.U * columns[order], order, factor.damp)  # (D^-1 H D^-1)^-1 = D H^-1 D
        (ours,) = round_with_feedback([scaled], factor, grid, clip=True, columns=columns)
        (theirs,) = round_with_feedback([scaled], of_scaled, grid, clip=True, columns=None)
    else:
        ours = round_nearest(scaled, s, grid, clip=True, columns=columns)
        theirs = round_nearest(scaled, site(x / columns), grid, clip=True, columns=None)
    assert (ours.q == theirs.q).double().mean() > 0.99
    assert (ours.scale == theirs.scale).double().mean() > 0.99
    a, b = energies(x, scaled, ours, columns).sum(), energies(x / columns, scaled, theirs).sum()
    assert float(a) == pytest.approx(float(b), rel=1e-3)
    ignored = round_nearest(scaled, s, grid, clip=True, columns=None)
    if grid.bits < 8 and not feedback:
        assert not same(ours, ignored)  # the columns count


def test_few_bits_try_more_ranges() -> None:
    for table in (GROUP_RANGES, ROW_RANGES):
        assert len(table[2]) >= len(table[3]) >= len(table[4]) > 0
        assert all(0 < part < 1 for parts in table.values() for part in parts)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_bfloat16_H_costs_little(grid: Grid) -> None:  # noqa: N802
    x, (w,) = inputs(), weights(40)
    exact = energies(x, w, round_nearest(w, site(x), grid, clip=True, columns=None)).sum()
    fast = energies(x, w, round_nearest(w, site(x, torch.bfloat16), grid, clip=True, columns=None)).sum()
    assert float(fast) == pytest.approx(float(exact), rel=0.01)
