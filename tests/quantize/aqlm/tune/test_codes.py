"""The search for codes against all combinations."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm.tune import codes as module
from backend.quantize.aqlm.tune.codes import largest, nearest_codes, within_trust


def problem(n: int, books: int, words: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Targets, present codes, codebooks."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(n, width, generator=generator)
    present = torch.randint(0, words, (n, books), generator=generator, dtype=torch.int32)
    return targets, present, torch.randn(books, words, width, generator=generator)


def distances(targets: Tensor, codebooks: Tensor) -> tuple[Tensor, Tensor]:
    """Of every combination of codes: (n, M^K) in float64, and the combinations (M^K, K)."""
    books, words, _ = codebooks.shape
    combinations = torch.tensor(list(product(range(words), repeat=books)))
    sums = sum(codebooks[k].double()[combinations[:, k]] for k in range(books))
    return (targets.double()[:, None] - sums).square().sum(-1), combinations  # type: ignore[operator]


def errors(targets: Tensor, found: Tensor, codebooks: Tensor) -> Tensor:
    sums = sum(codebooks[k].double()[found[:, k].long()] for k in range(len(codebooks)))
    return (targets.double() - sums).square().sum(-1)  # type: ignore[operator]


@pytest.mark.parametrize(("books", "words", "beam"), [(1, 16, 1), (1, 33, 4), (2, 8, 8), (2, 16, 16), (3, 4, 16)])
@pytest.mark.parametrize("first", [0, 1])
def test_a_full_beam_finds_the_best_combination(books: int, words: int, beam: int, first: int) -> None:
    targets, present, codebooks = problem(40, books, words, 4)
    found = nearest_codes(targets, present, codebooks, beam=beam, first=first % books)
    every, combinations = distances(targets, codebooks)
    assert torch.equal(found.long(), combinations[every.argmin(1)])
    assert found.dtype == torch.int32


@pytest.mark.parametrize("beam", [1, 2, 5])
def test_a_narrow_beam_is_never_worse_than_the_present_codes(beam: int) -> None:
    targets, present, codebooks = problem(300, 3, 16, 4)
    before = errors(targets, present, codebooks)
    after = errors(targets, nearest_codes(targets, present, codebooks, beam=beam), codebooks)
    assert bool((after <= before + 1e-5).all())
    assert after.sum() < 0.5 * before.sum()


def test_a_wider_beam_is_better() -> None:
    targets, present, codebooks = problem(500, 3, 16, 4)
    totals = [
        float(errors(targets, nearest_codes(targets, present, codebooks, beam=b), codebooks).sum()) for b in (1, 4, 16)
    ]
    assert totals[0] > totals[1] > totals[2]


@pytest.mark.parametrize(("books", "words"), [(1, 16), (2, 8)])
def test_forced_codes_are_the_best_others(books: int, words: int) -> None:
    targets, _, codebooks = problem(40, books, words, 4)
    every, combinations = distances(targets, codebooks)
    order = every.argsort(1)
    best = combinations[order[:, 0]].int()
    found = nearest_codes(targets, best, codebooks, beam=words, force=True)
    assert torch.equal(found.long(), combinations[order[:, 1]])
    elsewhere = combinations[order[:, 5]].int()  # where the best is another one anyway, it is taken
    assert torch.equal(nearest_codes(targets, elsewhere, codebooks, beam=words, force=True), best)


def test_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    targets, present, codebooks = problem(100, 2, 16, 4)
    whole = nearest_codes(targets, present, codebooks, beam=3)
    monkeypatch.setattr(module, "TILE_FLOATS", 16 * 3 * 7)
    assert torch.equal(nearest_codes(targets, present, codebooks, beam=3), whole)


def test_no_groups() -> None:
    targets, present, codebooks = problem(0, 2, 16, 4)
    assert nearest_codes(targets, present, codebooks, beam=3).shape == (0, 2)


def test_the_largest_changes_come_first() -> None:
    changes = torch.tensor([[0.5, 3.0, 0.0], [2.0, 1.0, 4.0]])
    assert largest(changes, 0.5).tolist() == [5, 1, 3]
    assert largest(changes, 0.001).tolist() == [5]
    assert len(largest(changes, 1.0)) == 6


def test_changes_within_a_norm() -> None:
    squares = torch.tensor([9.0, 0.0, 16.0, 1.0], dtype=torch.float64)  # norms 3, 3, 5, 5.1
    assert within_trust(squares, 5.0).tolist() == [True, True, True, False]
    assert within_trust(squares, 4.9).tolist() == [True, True, False, False]
    assert within_trust(squares, 1.0).tolist() == [True, False, False, False]  # always the first that moves
    assert within_trust(torch.tensor([0.0, 4.0, 1.0]).double(), 1.0).tolist() == [True, True, False]
