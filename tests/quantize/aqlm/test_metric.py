"""The metric against definitions in float64."""

from __future__ import annotations

import pytest
import torch

from backend.errors import ModelError
from backend.quantize.aqlm.metric import BLOCK, diagonal_blocks, metric_of
from tests.quantize.aqlm.slow import gram, loss, weight

WIDTH, SIZE, DAMP = 160, 8, 0.01  # more than a block, no multiple of it


@pytest.mark.parametrize("act_order", [False, True])
def test_parts_are_those_of_the_ordered_damped_matrix(act_order: bool) -> None:
    H = gram(WIDTH)  # noqa: N806
    metric = metric_of(H.float(), SIZE, DAMP, act_order)
    columns = metric.arrange(torch.arange(WIDTH).unsqueeze(0))[0]
    expected = H[columns][:, columns] / H.diagonal().mean() + DAMP * torch.eye(WIDTH, dtype=torch.float64)
    assert torch.allclose(metric.H.double(), expected, rtol=1e-5, atol=1e-6)
    T = torch.block_diag(*metric.T).double() @ metric.reach.double()  # noqa: N806
    assert torch.equal(metric.reach, metric.reach.triu())
    assert torch.allclose(T @ T.T, expected, rtol=1e-4, atol=1e-4)
    L = metric.L.double()  # noqa: N806
    assert torch.allclose(L @ L.mT, diagonal_blocks(expected, SIZE), rtol=1e-4, atol=1e-5)
    assert torch.allclose(L @ metric.L_inverse.double(), torch.eye(SIZE, dtype=torch.float64).expand_as(L), atol=1e-4)
    energy = H.diagonal().view(-1, SIZE).sum(1)
    if act_order:
        assert bool((energy[metric.groups].diff() <= 0).all())
    else:
        assert metric.groups.tolist() == list(range(WIDTH // SIZE))


def test_loss_is_the_sum_of_what_the_groups_leave() -> None:
    """The identity behind error feedback: tr(D H D^T) = sum over j of ||sum over i <= j of D_i T_ij||^2."""
    metric = metric_of(gram(WIDTH).float(), SIZE, DAMP, True)
    D = weight(12, WIDTH).double()  # noqa: N806
    T = torch.block_diag(*metric.T).double() @ metric.reach.double()  # noqa: N806
    parts = (D @ T).view(12, -1, SIZE).square().sum(2)
    assert torch.allclose(parts.sum(1), loss(D, metric.H), rtol=1e-4)


def test_blocks_cover_all_groups_once() -> None:
    metric = metric_of(gram(WIDTH).float(), SIZE, DAMP, True)
    assert [j for a, b in metric.blocks() for j in range(a, b)] == list(range(WIDTH // SIZE))
    assert max(b - a for a, b in metric.blocks()) * SIZE == BLOCK
    wide = metric_of(gram(192).float(), 64, DAMP, True)
    assert wide.blocks() == [(0, 2), (2, 3)]


def test_inputs_that_are_never_active_are_no_obstacle() -> None:
    H = gram(64)  # noqa: N806
    H[8:24] = 0
    H[:, 8:24] = 0
    metric = metric_of(H.float(), SIZE, DAMP, True)
    assert metric.damp == DAMP
    assert not metric.notes
    assert metric.groups[-2:].tolist() == [1, 2]
    assert bool(torch.isfinite(metric.reach).all())


def test_damping_is_raised_for_a_matrix_that_is_slightly_indefinite() -> None:
    H = gram(64)  # noqa: N806
    values, vectors = torch.linalg.eigh(H)
    values[0] = -0.05 * H.diagonal().mean()
    metric = metric_of(((vectors * values) @ vectors.T).float(), SIZE, DAMP, True)
    assert metric.damp == pytest.approx(0.1)
    assert "damping raised to 0.1" in metric.notes[0]
    with pytest.raises(ModelError, match="not positive semidefinite"):
        metric_of(torch.ones(16, 16) - 30 * (1 - torch.eye(16)), SIZE, DAMP, True)


def test_without_any_input_all_weights_count_alike() -> None:
    metric = metric_of(torch.zeros(32, 32), SIZE, DAMP, True)
    assert torch.allclose(metric.H, (1 + DAMP) * torch.eye(32))
    assert "all zero" in metric.notes[0]


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite")])
def test_values_that_are_not_finite_are_refused(value: float, message: str) -> None:
    H = gram(32).float()  # noqa: N806
    H[3, 4] = value
    with pytest.raises(ModelError, match=message):
        metric_of(H, SIZE, DAMP, True)


def test_a_negative_diagonal_is_refused() -> None:
    with pytest.raises(ModelError, match="negative diagonal"):
        metric_of(-torch.eye(16), SIZE, DAMP, True)


def test_the_matrix_that_is_given_stays_as_it_is() -> None:
    H = gram(64).float()  # noqa: N806
    before = H.clone()
    metric_of(H, SIZE, DAMP, False)
    assert torch.equal(H, before)
