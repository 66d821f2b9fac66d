"""Gradients of codebooks and scales against autograd, and the limits of code changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.linear import TunedLinear
from backend.quantize.aqlm.tune.settings import TuneSettings

OUT, WIDTH, CPU = 24, 40, torch.device("cpu")


def weight(books: int = 2, nbits: int = 4, width: int = 8, seed: int = 0) -> AdditiveWeight:
    generator = torch.Generator().manual_seed(seed)
    shape = (OUT, WIDTH // width, books)
    return AdditiveWeight(
        torch.randint(0, 1 << nbits, shape, generator=generator, dtype=torch.int32),
        torch.randn(books, 1 << nbits, width, generator=generator),
        torch.rand(OUT, generator=generator) + 0.5,
    )


def linear(start: AdditiveWeight, wish: float | Tensor = 0.0, seed: int = 1) -> TunedLinear:
    """With a buffer that differs from the weight by noise of this size, or by a tensor."""
    found = TunedLinear(start, Group(), CPU)
    noise = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(seed)) * wish
    found.buffer = found.weight() + noise
    return found


@pytest.mark.parametrize(("books", "nbits", "width"), [(1, 6, 8), (2, 4, 8), (3, 3, 4)])
def test_gradients_against_autograd_in_float64(books: int, nbits: int, width: int) -> None:
    start = weight(books, nbits, width)
    grad = torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(2))
    codebooks = start.codebooks.double().requires_grad_(True)
    scales = start.scales.double().requires_grad_(True)
    groups = sum(codebooks[k][start.codes[:, :, k].long()] for k in range(books))
    dense = groups.reshape(OUT, WIDTH) * scales[:, None]  # type: ignore[union-attr]
    (dense * grad.double()).sum().backward()
    found = TunedLinear(start, Group(), CPU)
    of_words, of_scales = found.gradients(grad)
    torch.testing.assert_close(of_words.double(), codebooks.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_scales.double(), scales.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.weight().double(), dense.detach(), rtol=1e-6, atol=1e-6)


def test_gradients_follow_new_codes() -> None:
    start, other = weight(), weight(seed=7)
    grad = torch.ones(OUT, WIDTH)
    found = TunedLinear(start, Group(), CPU)
    found.set_codes(other.codes)
    fresh = TunedLinear(AdditiveWeight(other.codes, start.codebooks, start.scales), Group(), CPU)
    for mine, expected in zip(found.gradients(grad), fresh.gradients(grad), strict=True):
        assert torch.equal(mine, expected)


def change(found: TunedLinear, **settings: Any) -> tuple[int, Tensor]:
    """Groups that changed as told, and where codes did: (out, groups)."""
    before = found.codes.clone()
    options = {"max_code_change_per_step": 1.0, "code_trust_ratio": None, "beam_size": 16}
    count = found.change_codes(TuneSettings(**(options | settings)), 1)  # type: ignore[arg-type]
    return count, (found.codes != before).any(-1)


def test_all_groups_go_to_the_best_codes_for_the_buffer() -> None:
    found = linear(weight(), wish=2.0)
    count, where = change(found)
    assert count == int(where.sum()) > OUT * WIDTH / 8 / 2
    assert found.buffer is not None
    targets = (found.buffer / found.scales[:, None]).view(OUT, -1, 1, 1, 8)
    sums = found.codebooks[0][:, None] + found.codebooks[1]  # (M, M, G)
    best = (targets - sums).square().sum(-1).flatten(2).argmin(-1)
    assert torch.equal(found.codes[..., 0] * 16 + found.codes[..., 1], best.int())


@pytest.mark.parametrize(("part", "most"), [(0.1, 12), (0.05, 6), (1e-6, 1)])
def test_no_more_groups_change_than_allowed_and_those_with_the_largest_wish(part: float, most: int) -> None:
    found = linear(weight(), wish=2.0)
    assert found.buffer is not None
    wish = (found.buffer - found.weight()).view(OUT, -1, 8).square().sum(-1)
    count, where = change(found, max_code_change_per_step=part)
    assert 0 < count == int(where.sum()) <= most
    assert float(wish[where].min()) >= wish.flatten().sort(descending=True).values[most - 1]


@pytest.mark.parametrize("ratio", [0.3, 0.1, 0.02])
def test_the_weight_moves_no_further_than_trusted(ratio: float) -> None:
    found, free = (linear(weight(), wish=2.0) for _ in range(2))
    before = found.weight()
    unlimited, _ = change(free)
    count, _ = change(found, code_trust_ratio=ratio)
    moved = float((found.weight() - before).norm() / before.norm())
    assert 0 < count < unlimited
    assert moved <= ratio or count == 1
    assert ratio > 0.05 or count == 1  # one group is more than 2 % here, and one may always change


def test_no_wish_no_change() -> None:
    found = linear(weight(nbits=6), wish=0.0)
    assert change(found, max_code_change_per_step=0.2)[0] == 0
    found = linear(weight(nbits=6), wish=0.0)
    assert change(found, max_code_change_per_step=0.2, force_code_update=True)[0] == 24  # of 120


def test_a_row_without_a_scale() -> None:
    start = weight()
    start.scales[3] = 0
    found = linear(start, wish=2.0)
    change(found)
    assert bool(found.weight().isfinite().all())
    assert bool((found.weight()[3] == 0).all())


def test_the_same_twice() -> None:
    first, second = (linear(weight(), wish=1.0) for _ in range(2))
    change(first, code_trust_ratio=0.2)
    change(second, code_trust_ratio=0.2)
    assert torch.equal(first.codes, second.codes)


def test_what_it_holds_is_its_own() -> None:
    start = weight()
    codes = start.codes.clone()
    change(linear(start, wish=2.0))
    assert torch.equal(start.codes, codes)
