"""The published procedure against slow float64 versions of its parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backend.errors import ModelError
from backend.quantize.aqlm import reference as module
from backend.quantize.aqlm.beam_search import beam_search
from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.presets import PRESETS, SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import fit
from tests.quantize.aqlm import slow

OUT, WIDTH, SIZE = 12, 48, 4
GROUPS = WIDTH // SIZE
SCHEME = AdditiveScheme(2, 4, 8)
SETTINGS = SearchSettings(
    "reference", max_epochs=4, steps_per_epoch=20, init_max_iter=20, init_max_points_per_centroid=None, lr=1e-3
)


def slow_beam_search(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    codes: Tensor,
    words: Tensor,
    scales: Tensor,
    beam: int,
    seed: int,
) -> Tensor:
    """Row by row, every candidate's loss computed from the whole row; the order drawn as the fast one draws it."""
    generator = torch.Generator().manual_seed(seed)
    K, M, _ = words.shape  # noqa: N806
    order = torch.randperm(codes.shape[1], generator=generator).tolist()
    books = [torch.randperm(K, generator=generator).tolist() for _ in order]
    result = codes.clone()
    for o in range(len(W)):
        paths = [codes[o]]
        for j in order:
            for k in books[j]:
                found = []
                for path in paths:
                    options = path.repeat(M, 1, 1)
                    options[:, j, k] = torch.arange(M)
                    losses = slow.loss(W[o].double() - scales[o].double() * slow.sums(options, words), H)
                    found += [(float(loss), option) for loss, option in zip(losses, options, strict=True)]
                found.sort(key=lambda each: each[0])
                paths = [option for _, option in found[:beam]]
        result[o] = paths[0]
    return result


@pytest.mark.parametrize("beam", [1, 3])
def test_beam_search_is_the_slow_one(beam: int) -> None:
    W, H, words = slow.weight(OUT, WIDTH), slow.gram(WIDTH), slow.codebooks(2, 8, SIZE) * 0.05  # noqa: N806
    scales, codes = (
        torch.rand(OUT, generator=torch.Generator().manual_seed(3)) + 0.5,
        slow.random_codes(OUT, GROUPS, 2, 8),
    )
    H = (H / H.diagonal().mean()).float()  # noqa: N806
    found = beam_search(W, H, codes, words, scales, beam, torch.Generator().manual_seed(9))
    expected = slow_beam_search(W, H, codes, words, scales, beam, 9)
    a, b = (slow.loss(W - scales.unsqueeze(1) * slow.sums(each, words), H) for each in (found, expected))
    assert float((found == expected).all(2).all(1).double().mean()) > 0.7  # a near tie changes all that follows
    assert torch.allclose(a.sum(), b.sum(), rtol=0.02)
    before = slow.loss(W - scales.unsqueeze(1) * slow.sums(codes, words), H)
    assert bool((a <= before * (1 + 1e-5)).all())


def test_gradients_are_those_of_autograd() -> None:
    W, H = slow.weight(OUT, WIDTH), slow.gram(WIDTH)  # noqa: N806
    codes, words = slow.random_codes(OUT, GROUPS, 2, 8), slow.codebooks(2, 8, SIZE)
    scales = torch.rand(OUT) + 0.5
    loss, (by_words, by_scales) = module.loss_and_gradients(W, H.float(), Codes(codes, 8), words, scales)
    C, s = words.double().requires_grad_(), scales.double().requires_grad_()  # noqa: N806
    groups = sum(C[k][codes[:, :, k].long()] for k in range(2))
    D = s.unsqueeze(1) * groups.flatten(1) - W.double()  # type: ignore[union-attr]  # noqa: N806
    expected = ((D @ H) * D).sum() / OUT
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(by_words.double(), C.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(by_scales.double(), s.grad, rtol=1e-4, atol=1e-5)


def test_kmeans_is_lloyds() -> None:
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    found = module._kmeans(x, 16, 7, torch.Generator().manual_seed(1))
    words = x[torch.randperm(400, generator=torch.Generator().manual_seed(1))[:16]].double()
    for _ in range(7):
        nearest = torch.cdist(x.double(), words).argmin(1)
        words = torch.stack(
            [x[nearest == m].double().mean(0) if bool((nearest == m).any()) else words[m] for m in range(16)]
        )
    # A point between two words may go the other way.
    assert float(((found.double() - words).abs().amax(1) < 1e-4).double().mean()) > 0.7
    a, b = (torch.cdist(x.double(), c.double()).amin(1).square().sum() for c in (found, words))
    assert torch.allclose(a, b, rtol=0.01)


def test_rounds_lower_the_error_and_the_best_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = slow.weight(64, 64), slow.gram(64).float()  # noqa: N806
    errors = [
        fit(W, H, SCHEME, SearchSettings(**{**SETTINGS.to_dict(), "max_epochs": n}), seed=0).relative_error
        for n in (0, 1, 4)
    ]
    assert errors[0] > 1.2 * errors[1] > 1.2 * errors[2] * 1.01
    rounds = []

    def spoilt(W: Tensor, H: Tensor, codes: Tensor, *rest: object) -> Tensor:  # noqa: N803
        rounds.append(0)
        return beam_search(W, H, codes, *rest) if len(rounds) < 3 else torch.zeros_like(codes)  # type: ignore[arg-type]

    two = fit(W, H, SCHEME, SearchSettings(**{**SETTINGS.to_dict(), "max_epochs": 2}), seed=0).relative_error
    monkeypatch.setattr(module, "beam_search", spoilt)
    assert fit(W, H, SCHEME, SETTINGS, seed=0).relative_error == pytest.approx(two, rel=1e-6)
    assert len(rounds) == 4


def test_it_stops_when_a_round_gains_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H, rounds = slow.weight(64, 64), slow.gram(64).float(), [0]  # noqa: N806

    def counted(*arguments: object) -> Tensor:
        rounds[0] += 1
        return beam_search(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "beam_search", counted)
    for tolerance, most in ((None, 30), (0.02, 15), (0.9, 1)):
        rounds[0] = 0
        settings = {**SETTINGS.to_dict(), "max_epochs": 30, "relative_mse_tolerance": tolerance}
        fit(W, H, SCHEME, SearchSettings(**settings), seed=0)
        assert 1 <= rounds[0] <= most
        assert tolerance is not None or rounds[0] == 30


def test_divergence_is_an_error() -> None:
    settings = SearchSettings(**{**SETTINGS.to_dict(), "lr": 1e30})
    with pytest.raises(ModelError, match="lower lr"):
        fit(slow.weight(64, 64), slow.gram(64).float(), SCHEME, settings, seed=0)


def test_the_preset_has_the_guides_values() -> None:
    preset = PRESETS["reference"]
    assert preset.procedure == "reference"
    wanted = {"beam_size": 1, "max_epochs": 100, "steps_per_epoch": 100, "lr": 1e-4, "relative_mse_tolerance": 0.01}
    wanted |= {"init_max_iter": 100, "init_max_points_per_centroid": None}
    assert {key: getattr(preset, key) for key in wanted} == wanted
