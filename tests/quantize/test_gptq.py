"""Error feedback against the paper's own loop in float64: column by column, eliminating from an explicit inverse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.gptq import BLOCK, INVERSE_BASE, SUB_BLOCK, Factor, factorize, feed_back, invert_lower_
from backend.quantize.grid import Grid

WIDTH = 192  # more than a block, no multiple of it
DAMP = 0.01


def gram(width: int = WIDTH, tokens: int = 500, seed: int = 0) -> Tensor:
    """Of correlated inputs with a few loud channels, float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.eye(width) + 0.2 * torch.randn(width, width, generator=generator)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, ::17] *= 8.0
    return x.double().T @ x.double()


def damped(H: Tensor, damp: float = DAMP) -> Tensor:  # noqa: N803
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("width", [1, 7, 64, INVERSE_BASE, INVERSE_BASE + 1])
def test_factor_is_that_of_the_damped_inverse(width: int, act_order: bool) -> None:
    H = gram(width, 2 * width + 50)  # noqa: N806
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-3)):
        factor = factorize(H.to(dtype), DAMP, act_order)
        assert factor is not None
        assert factor.damp == DAMP
        U = factor.U.double()  # noqa: N806
        assert torch.equal(U, U.triu())
        assert bool((U.diagonal() > 0).all())
        inverse = torch.linalg.inv(damped(H))
        if act_order:
            assert factor.order is not None
            energy = H.diagonal()[factor.order]
            assert bool((energy[1:] <= energy[:-1]).all())
            inverse = inverse[factor.order][:, factor.order]
        else:
            assert factor.order is None
        assert (U.T @ U - inverse).norm() <= tolerance * inverse.norm()


def test_factorize_leaves_H_alone() -> None:  # noqa: N802
    H = gram(40)  # noqa: N806
    before = H.clone()
    factorize(H, DAMP, True)
    factorize(H, DAMP, False)
    assert torch.equal(H, before)


def test_equal_energies_stay_in_their_order() -> None:
    factor = factorize(torch.eye(9), DAMP, True)
    assert factor is not None
    assert factor.order is not None
    assert factor.order.tolist() == list(range(9))


@pytest.mark.parametrize("act_order", [False, True])
def test_singular_H_raises_the_damping(act_order: bool) -> None:  # noqa: N802
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    factor = factorize(x.T @ x, 1e-12, act_order)
    assert factor is not None
    raised = [1e-12 * 10**n for n in range(1, 13)]
    assert any(factor.damp == pytest.approx(value, rel=1e-6) for value in raised)
    assert torch.isfinite(factor.U).all()
    same = factorize(x.T @ x, factor.damp, act_order)  # that damping is enough from the start
    assert same is not None
    assert same.damp == factor.damp
    negative = -10 * torch.eye(4)
    negative[0, 0] = 31  # mean diagonal 0.25: no damping up to 1 helps
    assert factorize(negative, DAMP, act_order) is None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_beyond_repair(act_order: bool, value: float) -> None:
    assert factorize(torch.zeros(16, 16), DAMP, act_order) is None
    for at in ((3, 3), (0, 0), (2, 9), (15, 0)):
        H = gram(16).float()  # noqa: N806
        H[at] = H[at[::-1]] = value
        assert factorize(H, DAMP, act_order) is None, at


@pytest.mark.parametrize("n", [1, 5, INVERSE_BASE, INVERSE_BASE + 1, 2 * INVERSE_BASE + 3])
def test_triangles_are_inverted_in_place(n: int) -> None:
    L = torch.linalg.cholesky(damped(gram(n, n + 20)))  # noqa: N806
    inverse = invert_lower_(L.clone())
    torch.testing.assert_close(inverse, torch.linalg.inv(L), rtol=1e-8, atol=1e-12)
    view = L.clone()
    assert invert_lower_(view) is view
    assert torch.equal(view, inverse)
    assert torch.equal(view, view.tril())


def paper(
    w: Tensor,
    H: Tensor,  # noqa: N803
    order: list[int],
    scale: Tensor,
    zero: Tensor,
    levels: int,
) -> tuple[Tensor, Tensor]:
    """Quantize a column, correct the others, eliminate it from the inverse of H, which is damped already.

    Returns:
        Codes (out, in), and how far each value lay from a change of code, in steps, when its turn came.
    """
    w, scale, zero = w.double().clone(), scale.double(), zero.double()
    inverse = torch.linalg.inv(H)
    group = w.shape[1] // scale.shape[1]
    codes, margin = torch.zeros_like(w), torch.zeros_like(w)
    for j in order:
        s, z = scale[:, j // group], zero[:, j // group]
        exact = w[:, j] / s + z
        codes[:, j] = exact.round().clamp(0, levels)
        margin[:, j] = (exact - (exact.floor() + 0.5).clamp(0.5, levels - 0.5)).abs()
        error = (w[:, j] - (codes[:, j] - z) * s) / inverse[j, j]
        w -= error[:, None] * inverse[j]
        inverse = inverse - inverse[:, j, None] * inverse[None, j] / inverse[j, j]
    return codes.to(torch.uint8), margin


def check(
    w: Tensor,
    H: Tensor,  # noqa: N803
    grid: Grid,
    act_order: bool,
    columns: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Codes and energies are those of the paper's loop, up to the first tie of a row."""
    factor = factorize(H, DAMP, act_order)
    assert factor is not None
    order = list(range(w.shape[1])) if factor.order is None else factor.order.tolist()
    factor = Factor(factor.U.to(dtype), factor.order, factor.damp)
    w = w.to(dtype)
    scale, zero = (t.squeeze(-1) for t in grid.fit(grid.grouped(w)))
    before = w.clone()
    codes, energy = feed_back(w, factor, grid, scale, zero, columns=None if columns is None else columns.to(dtype))
    assert torch.equal(w, before)
    assert codes.dtype == torch.uint8
    inputs = damped(H)
    if columns is not None:  # the damping belongs to the unscaled input
        inputs = inputs / columns.double() / columns.double()[:, None]
    expected, margin = paper(w, inputs, order, scale, zero, grid.levels)
    tie = 1e-4 if dtype == torch.float32 else 1e-9
    clear = margin[:, order].cummin(1).values > tie
    assert bool((codes[:, order] == expected[:, order])[clear].all())
    assert clear[:, -1].double().mean() > 0.8  # most rows are compared to their end
    size = w.shape[1] // scale.shape[1]
    wide_scale, wide_zero = (t.double().repeat_interleave(size, 1) for t in (scale, zero))
    e = (codes.double() - wide_zero) * wide_scale - w.double()
    torch.testing.assert_close(energy.double(), ((e @ inputs) * e).sum(1), rtol=1e-3, atol=0)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"),
    [(2, 64, False), (3, 32, True), (3, -1, False), (4, 32, False), (4, -1, True), (8, 64, False)],
)
@pytest.mark.parametrize("scaled", [False, True])
def test_codes_are_those_of_the_papers_loop(
    act_order: bool, bits: int, group_size: int, symmetric: bool, scaled: bool
) -> None:
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(24, WIDTH, generator=generator) * 0.1
    columns = torch.empty(WIDTH).log_normal_(0, 1, generator=generator) if scaled else None
    grid = Grid(bits, group_size, symmetric)
    for dtype in (torch.float64, torch.float32):
        check(w if columns is None else w * columns, gram(), grid, act_order, columns, dtype)


@pytest.mark.parametrize("width", [32, SUB_BLOCK * 3, BLOCK, BLOCK + 32, 2 * BLOCK])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_number_of_blocks(width: int, act_order: bool) -> None:
    w = torch.randn(16, width, generator=torch.Generator().manual_seed(width))
    check(w, gram(width), Grid(3, 32, False), act_order, dtype=torch.float64)


def test_it_beats_plain_rounding_in_every_row_and_stacks() -> None:
    H, grid = gram().float(), Grid(3, 32, False)  # noqa: N806
    w = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(3))
    factor = factorize(H, DAMP, True)
    assert factor is not None
    scale, zero = (t.squeeze(-1) for t in grid.fit(grid.grouped(w)))
    codes, energy = feed_back(w, factor, grid, scale, zero)
    e = grid.nearest(w).double() - w.double()
    assert bool((energy.double() < 0.7 * ((e @ damped(H.double())) * e).sum(1)).all())
    for rows in (slice(0, 8), slice(8, 40)):
        some, some_energy = feed_back(w[rows], factor, grid, scale[rows], zero[rows])
        assert (some == codes[rows]).double().mean() > 0.999  # products of other shapes add up in another order
        torch.testing.assert_close(some_energy, energy[rows], rtol=1e-2, atol=0)


def test_without_correlations_it_is_plain_rounding() -> None:
    H = torch.diag(torch.rand(64, generator=torch.Generator().manual_seed(0)) + 0.1)  # noqa: N806
    w, grid = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), Grid(4, 32, False)
    for act_order in (False, True):
        factor = factorize(H, DAMP, act_order)
        assert factor is not None
        scale, zero = grid.fit(grid.grouped(w))
        codes, _ = feed_back(w, factor, grid, scale.squeeze(-1), zero.squeeze(-1))
        assert torch.equal(codes.float(), grid.codes(grid.grouped(w), scale, zero).flatten(-2))
