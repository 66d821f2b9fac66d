"""Sums over codes, codebooks and scales for given codes, each against float64 definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.quantize.aqlm.codebooks import fit_codebooks, fit_scales
from backend.quantize.aqlm.codes import Codes
from tests.quantize.aqlm import slow

OUT, WIDTH, SIZE, WORDS = 40, 32, 4, 6
GROUPS = WIDTH // SIZE


def design(codes: Tensor, M: int) -> Tensor:  # noqa: N803
    """The linear map from codewords to groups, (out * groups, K * M), float64."""
    out, groups, K = codes.shape  # noqa: N806
    A = torch.zeros(out * groups, K * M, dtype=torch.float64)  # noqa: N806
    for k in range(K):
        A[torch.arange(out * groups), codes[:, :, k].flatten().long() + k * M] += 1
    return A


@pytest.mark.parametrize("K", [1, 2, 3])
def test_gather_and_scatter_are_a_map_and_its_transpose(K: int) -> None:  # noqa: N803
    raw = slow.random_codes(OUT, GROUPS, K, WORDS)
    raw[raw == 2] = 3  # a word that nobody uses
    words, values = slow.codebooks(K, WORDS, SIZE), slow.weight(OUT, WIDTH)
    codes, A = Codes(raw, WORDS), design(raw, WORDS)  # noqa: N806
    assert torch.allclose(codes.gather(words).double(), slow.sums(raw, words), atol=1e-6)
    expected = A.T @ values.double().view(-1, SIZE)
    assert torch.allclose(codes.scatter(values).double().flatten(0, 1), expected, atol=1e-5)
    assert bool((codes.scatter(values)[:, 2] == 0).all())


@pytest.mark.parametrize("per_group", [False, True])
def test_scatter_of_what_belongs_to_places(per_group: bool) -> None:
    raw = slow.random_codes(OUT, GROUPS, 2, WORDS)
    generator = torch.Generator().manual_seed(5)
    table = torch.randn(GROUPS, 5, generator=generator)
    weights = torch.rand(OUT, GROUPS if per_group else 1, generator=generator)
    each = (weights.unsqueeze(2) * table).expand(OUT, GROUPS, 5).double()
    expected = design(raw, WORDS).T @ each.reshape(-1, 5)
    assert torch.allclose(Codes(raw, WORDS).scatter_places(table, weights).flatten(0, 1).double(), expected, atol=1e-4)


@pytest.mark.parametrize("K", [1, 2])
def test_codebooks_are_the_least_squares_solution(K: int) -> None:  # noqa: N803
    """Against a dense solver on the whole problem: rows s_o (V - Q)_o F with H = F F^T."""
    H, raw, words = slow.gram(WIDTH), slow.random_codes(OUT, GROUPS, K, WORDS), slow.codebooks(K, WORDS, SIZE)  # noqa: N806
    H += 0.01 * H.diagonal().mean() * torch.eye(WIDTH)  # noqa: N806
    W = slow.weight(OUT, WIDTH)  # noqa: N806
    scales = W.square().mean(1).sqrt()
    V, F = W / scales.unsqueeze(1), torch.linalg.cholesky(H)  # noqa: N806
    # Each codeword entry moves entry (j, t) of Q in the rows and groups that have the word.
    A = torch.kron(design(raw, WORDS), torch.eye(SIZE, dtype=torch.float64))  # noqa: N806
    A = A.view(OUT, WIDTH, -1)  # noqa: N806
    weighted = scales.double().view(-1, 1, 1) * (F.T @ A)
    wanted = scales.double().unsqueeze(1) * (V.double() @ F)
    solution = torch.linalg.lstsq(weighted.flatten(0, 1), wanted.flatten(), driver="gelsd").solution
    least = (weighted.flatten(0, 1) @ solution - wanted.flatten()).square().sum()

    def total(books: Tensor) -> Tensor:
        return (scales.double().square() * slow.loss(V - slow.sums(raw, books), H)).sum()

    codes = Codes(raw, WORDS)
    R = (V - codes.gather(words)) @ H.float()  # noqa: N806
    found = fit_codebooks(words, codes, scales.square(), R, H.float(), 300)
    assert total(words) > 1.5 * least
    assert total(found) < least * 1.002  # it stops when an iteration gains a thousandth of the best one
    few = fit_codebooks(words, codes, scales.square(), R, H.float(), 3)
    assert least < total(few) < 1.05 * least


def test_words_that_no_group_has_stay_where_they_are() -> None:
    raw, words = slow.random_codes(OUT, GROUPS, 2, WORDS), slow.codebooks(2, WORDS, SIZE)
    raw[raw == 4] = 1
    H, V = slow.gram(WIDTH).float(), slow.weight(OUT, WIDTH) * 30  # noqa: N806
    codes = Codes(raw, WORDS)
    found = fit_codebooks(words, codes, torch.ones(OUT), (V - codes.gather(words)) @ H, H, 5)
    assert torch.equal(found[:, 4], words[:, 4])
    assert not torch.equal(found[:, 1], words[:, 1])


def test_rows_of_no_weight_do_not_count() -> None:
    raw, words = slow.random_codes(OUT, GROUPS, 2, WORDS), slow.codebooks(2, WORDS, SIZE)
    H, V = slow.gram(WIDTH).float(), slow.weight(OUT, WIDTH) * 30  # noqa: N806
    weights = (torch.arange(OUT) < 25).float()
    found = []
    for rows in (slice(None), slice(25)):
        codes = Codes(raw[rows], WORDS)
        R = (V[rows] - codes.gather(words)) @ H  # noqa: N806
        found.append(fit_codebooks(words, codes, weights[rows], R, H, 5))
    assert torch.allclose(found[0], found[1], atol=1e-4)
    nothing = fit_codebooks(words, Codes(raw, WORDS), torch.zeros(OUT), V @ H, H, 5)
    assert torch.equal(nothing, words)


def test_scales_are_the_best_of_all() -> None:
    H, W = slow.gram(WIDTH), slow.weight(OUT, WIDTH)  # noqa: N806
    scales = W.square().mean(1).sqrt() * 1.3
    V = W / scales.unsqueeze(1)  # noqa: N806
    Q = V + 0.4 * torch.randn(OUT, WIDTH, generator=torch.Generator().manual_seed(7))  # noqa: N806
    QH = Q @ H.float()  # noqa: N806
    found = fit_scales(scales, Q, QH, (V - Q) @ H.float())
    closed = ((W.double() @ H) * Q).sum(1) / ((Q.double() @ H) * Q).sum(1)
    assert torch.allclose(found.double(), closed, rtol=1e-4)
    best = slow.loss(W - found.unsqueeze(1) * Q, H)
    for factor in (0.98, 1.02):
        assert bool((slow.loss(W - factor * found.unsqueeze(1) * Q, H) > best).all())


def test_a_scale_without_a_sound_best_stays() -> None:
    H, scales = torch.eye(8), torch.tensor([0.5, 0.5, 0.5])  # noqa: N806
    V = torch.ones(3, 8)  # noqa: N806
    Q = torch.stack([torch.zeros(8), -torch.ones(8), torch.ones(8) * 2])  # noqa: N806 - nothing, the wrong side, twice
    assert fit_scales(scales, Q, Q @ H, (V - Q) @ H).tolist() == [0.5, 0.5, 0.25]
