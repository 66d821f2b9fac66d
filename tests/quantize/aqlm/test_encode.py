"""Nearest words and best sums of words against all of them in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm import nearest as module
from backend.quantize.aqlm.encode import Encoder
from backend.quantize.aqlm.nearest import distance_table, least_distance, nearest, ranked, smallest
from tests.quantize.aqlm.slow import all_sums, codebooks

PRECISION = 2.0**-14  # of a distance: what its index in the mantissa may move it, twice


def targets(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed))


def extended(t: Tensor) -> Tensor:
    return torch.nn.functional.pad(t, (0, 1), value=1.0).T


@pytest.mark.parametrize("words", [2, 8, 256, 512, 4096])
@pytest.mark.parametrize("count", [1, 2, 8])
def test_smallest_of_each_class(words: int, count: int) -> None:
    if count > words:
        pytest.skip("more classes than words")
    scores = torch.randn(words, 37, generator=torch.Generator().manual_seed(1)) * 5
    values, rows = smallest(scores.clone(), count)
    assert values.shape == rows.shape == (count, 37)
    exact = scores.gather(0, rows.long())
    assert torch.allclose(values, exact, rtol=PRECISION)
    least = scores.amin(0)
    assert bool((exact.amin(0) <= least + PRECISION * least.abs()).all())
    # Each is the least of a class of words / count rows, and no two are of one class.
    for c in range(count):
        same = rows[c] % count if words <= 256 or count > 1 else rows[c] * 0
        assert len(same.unique()) == 1
        members = scores[rows[c, 0].item() % count :: count]
        assert bool((exact[c] <= members.amin(0) + PRECISION * members.amin(0).abs()).all())


@pytest.mark.parametrize("tile", [64, 2**17])
def test_nearest_words_are_those_of_all_distances(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(module.TILE, "cpu", tile)  # a tile of few points: the parts are put together again
    words, points = codebooks(1, 64, 8)[0], targets(50, 8)
    exact = torch.cdist(points.double(), words.double()).square()
    energy = points.square().sum(1)
    values, found = nearest(distance_table(words), extended(points))
    least = least_distance(distance_table(words), extended(points))
    assert torch.allclose(values[0] + energy, exact.amin(1).float(), rtol=1e-3)
    assert torch.allclose(least + energy, exact.amin(1).float(), rtol=1e-4)
    assert torch.allclose(exact.gather(1, found.T.long())[:, 0], exact.amin(1), rtol=1e-3)


def test_ranked_is_ascending() -> None:
    errors = torch.tensor([[3.0, 1.0], [1.0, 4.0], [2.0, 2.0]])
    assert ranked(errors, 1)[1].tolist() == [[1, 0]]
    assert ranked(errors, 2)[0].tolist() == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize(("K", "M", "G"), [(1, 64, 8), (2, 16, 4), (2, 32, 8), (1, 512, 8)])
def test_sums_are_the_best_of_all(K: int, M: int, G: int) -> None:  # noqa: N803
    """One codebook always, two with as many candidates as there are words."""
    words, whiten = codebooks(K, M, G), torch.randn(3, G, G, generator=torch.Generator().manual_seed(4))
    for place in range(3):
        white = whiten[place].double()
        t = targets(40, G, place)
        codes, rest = Encoder(words, whiten, M).encode(extended(t), place)
        found = sum(book[code[0].long()] for book, code in zip(words.double(), codes, strict=True)) @ white
        assert torch.allclose(rest[0].double(), t.double() - found, atol=1e-4)
        best = torch.cdist(t.double(), all_sums(words) @ white).square().amin(1)
        assert torch.allclose(rest[0].double().square().sum(1), best, rtol=2e-3)


def test_several_sums_come_best_first() -> None:
    words, t = codebooks(2, 16, 8), targets(30, 8)
    codes, rest = Encoder(words, torch.eye(8).unsqueeze(0), 16).encode(extended(t), 0, keep=4)
    errors = rest.square().sum(2)
    assert bool((errors.diff(dim=0) >= -1e-3 * errors[1:]).all())
    # For each first word its best partner: the four least of these sixteen.
    pairs = (t.double().unsqueeze(1) - all_sums(words)).square().sum(2).view(30, 16, 16).amin(2)
    assert torch.allclose(errors.T.double(), pairs.sort(1).values[:, :4], rtol=2e-3)
    assert len({tuple(codes[0][:, n].tolist()) for n in range(30)}) > 1


@pytest.mark.parametrize("K", [3, 8])
def test_paths_through_many_codebooks_are_better_than_greedy_ones(K: int) -> None:  # noqa: N803
    words, t = codebooks(K, 16, 8), targets(200, 8)
    greedy = t.double()
    for book in words.double():
        greedy = greedy - book[torch.cdist(greedy, book).argmin(1)]
    encoder = Encoder(words, torch.eye(8).unsqueeze(0), 8)
    codes, rest = encoder.encode(extended(t), 0, keep=2)
    found = sum(book[code[0].long()] for book, code in zip(words.double(), codes, strict=True))
    assert torch.allclose(rest[0].double(), t.double() - found, atol=1e-4)
    assert rest[0].square().sum() < 0.95 * greedy.square().sum()
    assert bool((rest[0].square().sum(1) <= rest[1].square().sum(1) * 1.001).all())
    assert torch.allclose(encoder.sums([code[0] for code in codes], 0), -found.float(), atol=1e-5)


def test_more_candidates_are_no_worse() -> None:
    words, t = codebooks(2, 64, 8), targets(500, 8)
    errors = [
        float(Encoder(words, torch.eye(8).unsqueeze(0), a).encode(extended(t), 0)[1].square().sum())
        for a in (1, 4, 16, 64)
    ]
    assert all(b < a for a, b in zip(errors, errors[1:], strict=False))
