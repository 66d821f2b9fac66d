"""Error feedback against its definition in float64, where every step solves for all groups still to come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm import feedback as module
from backend.quantize.aqlm.feedback import feed_back
from backend.quantize.aqlm.kmeans import residual_kmeans
from backend.quantize.aqlm.metric import metric_of
from tests.quantize.aqlm import slow

OUT, WIDTH, SIZE = 24, 160, 8


@pytest.fixture(scope="module")
def scaled() -> Tensor:
    W = slow.weight(OUT, WIDTH)  # noqa: N806
    return W / W.square().mean(1, keepdim=True).sqrt()


@pytest.mark.parametrize(("K", "M"), [(1, 16), (2, 8)])
def test_codes_are_those_of_the_definition(scaled: Tensor, K: int, M: int) -> None:  # noqa: N803
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(K, M, SIZE)
    codes = feed_back(scaled, metric, words, M)
    expected, costs = slow.feedback(scaled, metric, words)
    found = slow.sums(codes, words)
    # A near tie may go the other way, and then all that follows in its row differs: most rows have none.
    assert float(((found - expected).abs().amax(1) < 1e-5).double().mean()) > 0.8
    losses = slow.loss(scaled - found, metric.H)
    assert torch.allclose(losses.sum(), costs.sum(), rtol=0.02)
    same = (found - expected).abs().amax(1) < 1e-5
    assert torch.allclose(losses[same], costs.sum(1)[same], rtol=1e-3)


@pytest.mark.parametrize("beam", [1, 4])
def test_rows_are_independent(scaled: Tensor, beam: int, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(2, 16, SIZE)
    whole = feed_back(scaled, metric, words, 8, beam)
    monkeypatch.setattr(module, "CHUNK", 5 * WIDTH * beam)  # five rows at a time
    parts = feed_back(scaled, metric, words, 8, beam)
    a, b = (slow.loss(scaled - slow.sums(codes, words), metric.H) for codes in (whole, parts))
    assert float((whole == parts).all(2).all(1).double().mean()) > 0.8
    assert torch.allclose(a.sum(), b.sum(), rtol=0.01)


def test_a_beam_lowers_the_loss(scaled: Tensor) -> None:
    metric = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True)
    draws = torch.Generator().manual_seed(0)
    words = residual_kmeans(scaled, torch.ones(OUT), metric, (2, 32), None, 8, draws)
    losses = [
        float(slow.loss(scaled - slow.sums(feed_back(scaled, metric, words, 8, beam), words), metric.H).sum())
        for beam in (1, 2, 8)
    ]
    assert losses[0] > 1.01 * losses[1]
    assert losses[1] > 1.01 * losses[2]


def test_a_beam_without_company_is_plain_feedback(scaled: Tensor) -> None:
    """Uncorrelated inputs hand on nothing, so the best of each group is the best of all."""
    metric, words = metric_of(torch.eye(WIDTH), SIZE, 0.01, False), slow.codebooks(1, 16, SIZE)
    one, four = (feed_back(scaled, metric, words, 16, beam) for beam in (1, 4))
    a, b = (slow.loss(scaled - slow.sums(codes, words), metric.H) for codes in (one, four))
    assert torch.allclose(a, b, rtol=1e-3)


def test_feedback_pays_where_inputs_are_correlated(scaled: Tensor) -> None:
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(2, 16, SIZE)
    blind = metric_of(torch.eye(WIDTH), SIZE, 0.01, False)
    with_feedback, without = (feed_back(scaled, m, words, 16) for m in (metric, blind))
    a, b = (float(slow.loss(scaled - slow.sums(codes, words), metric.H).sum()) for codes in (with_feedback, without))
    assert a < 0.6 * b


def test_the_weight_stays_as_it_is(scaled: Tensor) -> None:
    before = scaled.clone()
    metric = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True)
    for beam in (1, 2):
        feed_back(scaled, metric, slow.codebooks(2, 16, SIZE), 4, beam)
    assert torch.equal(scaled, before)
