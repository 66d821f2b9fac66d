"""Coordinate descent: no row gets worse, and what is kept up to date is what would be computed anew."""

from __future__ import annotations

import pytest
import torch

from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.descent import descend
from backend.quantize.aqlm.feedback import feed_back
from backend.quantize.aqlm.metric import metric_of
from tests.quantize.aqlm import slow

OUT, WIDTH, SIZE = 32, 160, 8


@pytest.mark.parametrize(("K", "M"), [(1, 16), (2, 16), (4, 4)])
@pytest.mark.parametrize("start", ["random", "feedback"])
def test_no_row_gets_worse(K: int, M: int, start: str) -> None:  # noqa: N803
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(K, M, SIZE)
    V = slow.weight(OUT, WIDTH) * 30  # noqa: N806
    codes = slow.random_codes(OUT, WIDTH // SIZE, K, M)
    if start == "feedback":
        codes = feed_back(V, metric, words, 4)
    losses = [slow.loss(V - slow.sums(codes, words), metric.H)]
    R = (V - Codes(codes, M).gather(words)) @ metric.H  # noqa: N806
    for _ in range(3):
        codes = descend(codes, R, metric, words, 4)
        losses.append(slow.loss(V - slow.sums(codes, words), metric.H))
        exact = (V.double() - slow.sums(codes, words)) @ metric.H.double()
        assert (R.double() - exact).norm() < 1e-4 * (V.double() @ metric.H.double()).norm()
    assert all(bool((b <= a * (1 + 1e-5)).all()) for a, b in zip(losses, losses[1:], strict=False))
    assert losses[1].sum() < (0.2 if start == "random" else 0.95) * losses[0].sum()


def test_the_last_group_is_left_with_its_best_word() -> None:
    """One codebook is searched whole: after a pass no word of the group visited last would be better."""
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(1, 32, SIZE)
    V, codes = slow.weight(OUT, WIDTH) * 30, slow.random_codes(OUT, WIDTH // SIZE, 1, 32)  # noqa: N806
    R = (V - Codes(codes, 32).gather(words)) @ metric.H  # noqa: N806
    codes = descend(codes, R, metric, words, 1)
    found = slow.loss(V - slow.sums(codes, words), metric.H)
    for word in range(32):
        other = codes.clone()
        other[:, -1] = word
        assert bool((slow.loss(V - slow.sums(other, words), metric.H) >= found * (1 - 1e-4)).all())


def test_the_codes_that_are_given_stay_as_they_are() -> None:
    metric, words = metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True), slow.codebooks(2, 16, SIZE)
    V, codes = slow.weight(OUT, WIDTH) * 30, slow.random_codes(OUT, WIDTH // SIZE, 2, 16)  # noqa: N806
    before = codes.clone()
    descend(codes, (V - Codes(codes, 16).gather(words)) @ metric.H, metric, words, 4)
    assert torch.equal(codes, before)
