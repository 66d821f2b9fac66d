"""The first codebooks against plain loops in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm import kmeans as module
from backend.quantize.aqlm import nearest
from backend.quantize.aqlm.metric import Metric, metric_of
from tests.quantize.aqlm import slow

OUT, WIDTH, SIZE, WORDS = 48, 96, 8, 16
PLACES = WIDTH // SIZE


@pytest.fixture(scope="module")
def metric() -> Metric:
    return metric_of(slow.gram(WIDTH).float(), SIZE, 0.01, True)


def points(seed: int = 0) -> Tensor:
    return torch.randn(OUT, PLACES, SIZE, generator=torch.Generator().manual_seed(seed))


def distances(x: Tensor, words: Tensor, metric: Metric) -> Tensor:
    """||(x - c) T_j||^2, (n, places, M), float64."""
    miss = x.double().unsqueeze(2) - words.double()
    return (miss @ metric.T.double().unsqueeze(0)).square().sum(3)


@pytest.mark.parametrize("tile", [8, 100, 2**17])
def test_points_go_to_the_nearest_word(metric: Metric, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(nearest.TILE, "cpu", tile * WORDS)  # parts of a place, some places, all at once
    x, words = points(), slow.codebooks(1, WORDS, SIZE)[0]
    S = metric.T @ metric.T.mT  # noqa: N806
    codes = module._assign(torch.einsum("njg,jgh->njh", x, S), S, words)
    exact = distances(x, words, metric)
    assert codes.shape == (OUT, PLACES, 1)
    assert torch.allclose(exact.gather(2, codes.long())[..., 0], exact.amin(2), rtol=1e-3, atol=1e-4)


def test_centroids_are_the_weighted_best_of_their_points(metric: Metric) -> None:
    x, words = points(), slow.codebooks(1, WORDS, SIZE)[0]
    weights = torch.rand(OUT, PLACES, generator=torch.Generator().manual_seed(1))
    codes = slow.random_codes(OUT, PLACES, 1, WORDS)
    codes[codes == 5] = 6
    S = metric.T @ metric.T.mT  # noqa: N806
    target = torch.einsum("njg,jgh->njh", x, S) * weights.unsqueeze(2)
    found = module._centroids(target.flatten(1), weights, S.flatten(1), words, codes)
    assert torch.equal(found[5], words[5])
    for m in (0, 3, 6):
        own = (codes[..., 0] == m).nonzero().tolist()
        rows = torch.cat([weights[n, j].double().sqrt() * metric.T[j].double().T for n, j in own])
        wanted = torch.cat([weights[n, j].double().sqrt() * x[n, j].double() @ metric.T[j].double() for n, j in own])
        best = torch.linalg.lstsq(rows, wanted).solution
        assert torch.allclose(found[m].double(), best, rtol=1e-3, atol=1e-4)


def test_more_iterations_leave_less(metric: Metric) -> None:
    x, weights = points().flatten(1), torch.ones(OUT)
    losses = []
    for iterations in (1, 4, 16):
        words = module.residual_kmeans(
            x, weights, metric, (1, WORDS), None, iterations, torch.Generator().manual_seed(0)
        )
        losses.append(float(distances(x.view(OUT, PLACES, SIZE), words[0], metric).amin(2).sum()))
    assert losses[0] > losses[1] > losses[2]


def test_each_codebook_takes_from_what_the_others_left(metric: Metric) -> None:
    x = points().flatten(1)
    words = module.residual_kmeans(x, torch.ones(OUT), metric, (3, WORDS), None, 8, torch.Generator().manual_seed(0))
    rest = x.view(OUT, PLACES, SIZE).double()
    sizes = [float((rest.unsqueeze(2) @ metric.T.double()).square().sum())]
    for book in words.double():
        rest = rest - book[distances(rest, book, metric).argmin(2)]
        sizes.append(float((rest.unsqueeze(2) @ metric.T.double()).square().sum()))
    assert all(b < 0.8 * a for a, b in zip(sizes, sizes[1:], strict=False))


@pytest.mark.parametrize("count", [None, 4])
def test_a_sample_has_like_many_points_of_each_place(count: int | None) -> None:
    x, weights = points(), torch.arange(OUT).float()
    sample, taken = module._sample(
        x.flatten(1), weights, SIZE, None if count is None else count * PLACES, torch.Generator()
    )
    assert sample.shape == (OUT if count is None else count, PLACES, SIZE)
    rows = taken.long()
    for j in range(PLACES):
        assert len(set(rows[:, j].tolist())) == len(rows)  # other rows in each place, none twice
        assert torch.equal(sample[:, j], x[rows[:, j], j])


def test_as_many_words_as_points_and_equal_points(metric: Metric) -> None:
    few = points()[:2].flatten(1)  # 24 points for 16 words
    words = module.residual_kmeans(few, torch.ones(2), metric, (2, WORDS), 32, 4, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(words).all())
    same = torch.ones(OUT, WIDTH)
    words = module.residual_kmeans(same, torch.zeros(OUT), metric, (2, WORDS), 32, 4, torch.Generator().manual_seed(0))
    assert bool(torch.isfinite(words).all())
