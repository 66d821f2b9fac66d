"""The search for scales against losses computed from the outputs themselves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from backend.quantize import awq
from backend.quantize.awq import SEARCH_ROWS, Target, search_scale
from backend.quantize.fold import Fold
from backend.quantize.grid import Grid
from backend.quantize.rounding import round_nearest, round_with_feedback
from backend.quantize.site import Site

GRID = Grid(4, 32, False)
WIDTH = 96
RATIOS = 20


def problem(seed: int = 0, tokens: int = 300) -> tuple[Tensor, list[Tensor]]:
    """Correlated inputs with a few loud channels, and two Linears that share them."""
    torch.manual_seed(seed)
    x = torch.randn(tokens, WIDTH) @ (torch.eye(WIDTH) + 0.2 * torch.randn(WIDTH, WIDTH))
    x[:, ::17] *= 12.0
    return x, [torch.randn(40, WIDTH) * 0.1, torch.randn(24, WIDTH) * 0.1]


def site(x: Tensor) -> Site:
    return Site(("a", "b"), x.T @ x, x.abs().mean(0), None, torch.float32)


def output_error(x: Tensor, w: Tensor, scale: Tensor | None = None, grid: Grid = GRID) -> float:
    """Energy of a Linear's output error after plain rounding, from running it."""
    w_found = grid.nearest(w).double() if scale is None else grid.nearest(w * scale).double() / scale.double()
    return float((x.double() @ (w_found - w.double()).T).square().sum())


def search(
    s: Site,
    weights: Sequence[Tensor],
    ratios: int = RATIOS,
    channels: Tensor | None = None,
    width: int = WIDTH,
    grid: Grid = GRID,
    feedback: bool = False,
    clip: bool = False,
) -> Tensor | None:
    fold = Fold(("a", "b"), "norm", torch.arange(WIDTH) if channels is None else channels, width)
    factor = s.factor(0.01, True) if feedback else None
    return search_scale(s, fold, [Target(w, grid, factor) for w in weights], ratios, clip=clip)


def candidates(x_salience: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """AutoAWQ's, in float64 from its description."""
    together = torch.cat(list(weights)).double()
    groups = together.abs().view(-1, WIDTH // 32, 32)
    w_mean = (groups / (groups.amax(-1, keepdim=True) + 1e-6)).view(-1, WIDTH).mean(0)
    found = []
    for i in range(RATIOS):
        s = (x_salience.double() ** (i / RATIOS) / (w_mean ** (1 - i / RATIOS) + 1e-4)).clamp(min=1e-4)
        found.append((s / (s.max() * s.min()).sqrt()).float())
    return found


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_finds_the_best_of_the_autoawq_grid(seed: int) -> None:
    """A direct float64 search over AutoAWQ's ratios by running the Linears finds nothing better."""
    x, weights = problem(seed)
    losses = [sum(output_error(x, w, s) for w in weights) for s in candidates(x.abs().double().mean(0), weights)]
    plain = sum(output_error(x, w) for w in weights)
    found = search(site(x), weights)
    assert found is not None
    loss = sum(output_error(x, w, found) for w in weights)
    assert loss == pytest.approx(min(losses), rel=1e-3)
    assert loss < 0.7 * plain  # loud channels are what AWQ is for
    assert float(found.max() * found.min()) == pytest.approx(1.0, rel=1e-4)


def test_schemes_of_targets_count_each_for_itself() -> None:
    """Two Linears with different grids: the scale is the best for both together."""
    x, weights = problem(5)
    grids = [Grid(2, 32, True), Grid(8, 32, False)]
    fold = Fold(("a", "b"), "norm", torch.arange(WIDTH), WIDTH)
    found = search_scale(
        site(x), fold, [Target(w, g, None) for w, g in zip(weights, grids, strict=True)], RATIOS, clip=False
    )
    assert found is not None
    losses = [
        sum(output_error(x, w, s, g) for w, g in zip(weights, grids, strict=True))
        for s in candidates(x.abs().double().mean(0), weights)
    ]
    loss = sum(output_error(x, w, found, g) for w, g in zip(weights, grids, strict=True))
    assert loss == pytest.approx(min(losses), rel=1e-3)


def test_none_where_nothing_gains() -> None:
    x, weights = problem()
    exact = [GRID.nearest(w) for w in weights]
    exact = [w for w in exact if torch.equal(GRID.nearest(w), w)]  # plain rounding loses nothing
    assert exact
    assert search(site(x), exact) is None
    assert search(site(torch.zeros(10, WIDTH)), weights) is None  # an input that is always zero
    for feedback in (False, True):
        assert search(site(x), weights, ratios=0, feedback=feedback) is None


def rounded_error(x: Tensor, w: Tensor, scale: Tensor | None, grid: Grid, feedback: bool, clip: bool) -> float:
    """Energy of a Linear's output error after the rounding that will be done, from running it."""
    s = site(x)
    scaled = w if scale is None else w * scale
    if feedback:
        factor = s.factor(0.01, True)
        assert factor is not None
        (rounded,) = round_with_feedback([scaled], factor, grid, clip=clip, columns=scale)
    else:
        rounded = round_nearest(scaled, s, grid, clip=clip, columns=scale)
    found = rounded.dequantize(torch.float64) / (1.0 if scale is None else scale.double())
    return float((x.double() @ (found - w.double()).T).square().sum())


@pytest.mark.parametrize("grid", [GRID, Grid(2, 32, True), Grid(3, -1, False)], ids=str)
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_never_worse_than_no_scale(grid: Grid, feedback: bool, clip: bool) -> None:
    """After the real rounding, ranges and feedback included; on inputs where there is little to gain."""
    for seed in range(5):
        torch.manual_seed(seed)
        x, w = torch.randn(200, WIDTH), torch.randn(32, WIDTH)
        found = search(site(x), [w], grid=grid, feedback=feedback, clip=clip)
        if found is not None:
            with_scale, without = (rounded_error(x, w, scale, grid, feedback, clip) for scale in (found, None))
            assert with_scale < without * (1 + 1e-4)


@pytest.mark.parametrize("feedback", [False, True])
def test_dead_and_shared_channels(feedback: bool) -> None:
    x, weights = problem()
    x[:, 5] = 0.0
    channels = torch.arange(WIDTH) // 48 * 24 + torch.arange(WIDTH) % 24  # 4 heads of 24 on 2 shared ones
    for chosen, width in ((channels, 48), (None, WIDTH)):
        scale = search(site(x), weights, channels=chosen, width=width, feedback=feedback)
        assert scale is not None
        assert scale.shape == (width,)
        assert torch.isfinite(scale).all()
        assert (scale > 0).all()
        columns = scale if chosen is None else scale[chosen]
        if not feedback:
            assert sum(output_error(x, w, columns) for w in weights) < sum(output_error(x, w) for w in weights)


def test_shared_channels_get_the_mean_of_their_columns() -> None:
    values = torch.tensor([1.0, 2.0, 5.0, 4.0])
    assert awq._per_channel(values, torch.tensor([0, 1, 0, 1]), 2).tolist() == [3.0, 3.0]


def proxy(x: Tensor, weights: Sequence[Tensor], scale: Tensor | None, damp: float = 0.01) -> float:
    """What feedback will leave, float64: each input's conditional variance times its steps' squares / 12.

    The conditional variance of an input given those visited later comes here from Schur complements, not factors.
    """
    H = x.double().T @ x.double()  # noqa: N806
    order = H.float().diagonal().argsort(descending=True, stable=True)
    H += damp * H.diagonal().mean() * torch.eye(WIDTH, dtype=H.dtype)  # noqa: N806
    variance = torch.empty(WIDTH, dtype=H.dtype)
    for at, j in enumerate(order.tolist()):
        later = order[at + 1 :]
        cross = H[j, later]
        variance[j] = H[j, j] - cross @ torch.linalg.solve(H[later][:, later], cross)
    total = 0.0
    for w in weights:
        scaled = w if scale is None else w * scale
        steps = GRID.fit(GRID.grouped(scaled))[0].double().square().sum(0).repeat(1, 32).view(-1)
        total += float((steps * variance / (1.0 if scale is None else scale.double().square())).sum()) / 12
    return total


@pytest.mark.parametrize("seed", [0, 1])
def test_feedback_takes_the_candidate_of_least_proxy(seed: int) -> None:
    x, weights = problem(seed)
    s = site(x)
    factor = s.factor(0.01, True)
    assert factor is not None
    variance = awq._variance(factor)
    found = search(s, weights, feedback=True)
    assert found is not None
    tried = candidates(variance.sqrt(), weights)
    losses = [proxy(x, weights, c) for c in tried]
    assert proxy(x, weights, found) == pytest.approx(min(losses), rel=1e-3)
    assert min(losses) < proxy(x, weights, None)
    best = tried[losses.index(min(losses))]
    torch.testing.assert_close(found, best, rtol=1e-3, atol=0)


def test_the_proxy_is_near_what_feedback_leaves() -> None:
    """So that comparing proxies is comparing results, within the spread of a few rows."""
    x, weights = problem(2)
    s = site(x)
    factor = s.factor(0.01, True)
    assert factor is not None
    target = Target(weights[0], GRID, factor)
    (rounded,) = round_with_feedback([weights[0]], factor, GRID, clip=False, columns=None)
    e = rounded.dequantize(torch.float64) - weights[0].double()
    H = s.H.double()  # noqa: N806
    left = float(((e @ H) * e).sum() + 0.01 * H.diagonal().mean() * e.square().sum())
    assert awq._loss(s, target, None) == pytest.approx(proxy(x, weights[:1], None), rel=1e-3)
    assert awq._loss(s, target, None) == pytest.approx(left, rel=0.1)


def test_many_rows_are_sampled_evenly() -> None:
    x, _ = problem()
    torch.manual_seed(7)
    rows = torch.randn(SEARCH_ROWS, WIDTH) * 0.1
    many = rows.repeat_interleave(4, 0)
    some, all_rows = search(site(x), [rows]), search(site(x), [many])
    assert some is not None
    assert all_rows is not None
    assert torch.equal(some, all_rows)
