"""The whole search on one layer: how good, what of, and what it does with odd weights and inputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from backend.errors import ModelError
from backend.quantize.aqlm import fast
from backend.quantize.aqlm.presets import PRESETS, SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import Fitted, fit
from backend.quantize.gptq import factorize
from backend.quantize.grid import Grid
from backend.quantize.recipe import Scheme
from backend.quantize.rounding import round_with_feedback
from tests.quantize.aqlm import slow

SMALL = AdditiveScheme(2, 5, 8)
QUICK = SearchSettings(max_epochs=1, candidates=4, warm_ups=1)


def layer(out: int = 192, width: int = 128) -> tuple[Tensor, Tensor]:
    return slow.weight(out, width), slow.gram(width, 1000).float()


def error(W: Tensor, found: Tensor, H: Tensor) -> float:  # noqa: N803
    return float(slow.loss(found - W, H).sum() / slow.loss(W, H).sum())


def same(a: Fitted, b: Fitted) -> bool:
    return a.relative_error == b.relative_error and all(
        torch.equal(getattr(a.weight, name), getattr(b.weight, name)) for name in ("codes", "codebooks", "scales")
    )


@pytest.mark.parametrize("K, B, G", [(1, 8, 8), (2, 8, 8), (1, 10, 8), (3, 4, 4), (8, 3, 8), (2, 1, 4), (2, 6, 16)])
def test_any_scheme(K: int, B: int, G: int) -> None:  # noqa: N803
    W, H = layer()  # noqa: N806
    scheme = AdditiveScheme(K, B, G)
    for settings in (QUICK, replace(QUICK, beam_size=2)):
        found = fit(W, H, scheme, settings, seed=0)
        weight = found.weight
        assert weight.codes.shape == (192, 128 // G, K)
        assert weight.codes.dtype == torch.int32
        assert 0 <= int(weight.codes.min()) <= int(weight.codes.max()) < 2**B
        assert weight.codebooks.shape == (K, 2**B, G)
        assert weight.scales.shape == (192,)
        assert found.relative_error == pytest.approx(error(W, weight.dequantize(torch.float64), H), rel=2e-3)
        assert found.relative_error < 1.1 * 2 ** (-2 * K * B / G)  # of normal weights without any correlation


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_what_is_measured_is_what_is_stored(name: str) -> None:
    W, H = layer()  # noqa: N806
    found = fit(W, H, SMALL, replace(PRESETS[name], max_epochs=min(PRESETS[name].max_epochs, 2)), seed=0)
    stored = found.weight.stored()
    for part in ("codebooks", "scales"):
        assert torch.equal(getattr(stored, part).float(), getattr(found.weight, part))
    assert found.relative_error == pytest.approx(error(W, stored.dequantize(torch.float64), H), rel=2e-3)


def correlated(width: int, tokens: int) -> Tensor:
    """Inputs whose covariance has the eigenvalues 1, 2^-1.5, 3^-1.5, ... in random directions, (tokens, width)."""
    generator = torch.Generator().manual_seed(0)
    directions, _ = torch.linalg.qr(torch.randn(width, width, generator=generator))
    spectrum = torch.arange(1, width + 1).pow(-0.75)
    return (torch.randn(tokens, width, generator=generator) * spectrum) @ directions.T


def test_it_beats_gptq_and_the_published_procedure() -> None:
    W, X = slow.weight(256, 256), correlated(256, 4096)  # noqa: N806
    H, unseen = X[:3072].T @ X[:3072], X[3072:].T @ X[3072:]  # noqa: N806
    factor = factorize(H, 0.01, True)
    assert factor is not None
    scalar = round_with_feedback([W], factor, Grid.of(Scheme("GPTQ", 2, 64), torch.float16), clip=True, columns=None)
    names = ("fast", "default", "reference")
    weights = {name: fit(W, H, AdditiveScheme(), PRESETS[name], seed=0).weight.dequantize() for name in names}
    for gram in (H, unseen):
        errors = {name: error(W, found, gram) for name, found in weights.items()}
        assert errors["fast"] < 0.7 * error(W, scalar[0].dequantize(), gram)
        assert errors["fast"] < 0.85 * errors["reference"]
        assert errors["default"] < 0.95 * errors["fast"]
        assert errors["default"] < 0.8 * errors["reference"]


def test_more_effort_leaves_less_error() -> None:
    W, H = layer(256, 256)  # noqa: N806
    errors = [fit(W, H, AdditiveScheme(), PRESETS[n], seed=0).relative_error for n in ("fast", "default", "thorough")]
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, beam_size=2), replace(PRESETS["reference"], max_epochs=1)])
def test_a_seed_decides_everything(settings: SearchSettings) -> None:
    W, H = layer()  # noqa: N806
    before = W.clone(), H.clone()
    first = fit(W, H, SMALL, settings, seed=3)
    torch.randn(5)  # the global generator plays no part
    assert same(first, fit(W, H, SMALL, settings, seed=3))
    assert not same(first, fit(W, H, SMALL, settings, seed=4))
    assert torch.equal(W, before[0])
    assert torch.equal(H, before[1])


def test_the_best_round_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = layer()  # noqa: N806
    expected = fit(W, H, SMALL, replace(QUICK, max_epochs=2), seed=0)
    rounds, descend = [0], fast.descend

    def spoilt(codes: Tensor, R: Tensor, *rest: object) -> Tensor:  # noqa: N803
        rounds[0] += 1
        return descend(codes, R, *rest) if rounds[0] <= 2 else torch.zeros_like(codes)  # type: ignore[arg-type]

    monkeypatch.setattr(fast, "descend", spoilt)
    assert same(fit(W, H, SMALL, replace(QUICK, max_epochs=5), seed=0), expected)
    assert rounds[0] == 5


def test_it_stops_when_a_round_gains_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    W, H = layer()  # noqa: N806
    rounds, descend = [0], fast.descend

    def counted(*arguments: object) -> Tensor:
        rounds[0] += 1
        return descend(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(fast, "descend", counted)
    for tolerance, expected in ((None, 12), (0.9, 1)):
        rounds[0] = 0
        fit(W, H, SMALL, replace(QUICK, max_epochs=12, relative_mse_tolerance=tolerance), seed=0)
        assert rounds[0] == expected
    rounds[0] = 0
    fit(W, H, SMALL, replace(QUICK, max_epochs=12, relative_mse_tolerance=0.02), seed=0)
    assert 1 <= rounds[0] < 12


@pytest.mark.parametrize("procedure", ["fast", "reference"])
def test_rows_of_zeros_stay_zeros(procedure: str) -> None:
    W, H = layer()  # noqa: N806
    W[[0, 7, 100]] = 0
    found = fit(W, H, SMALL, replace(QUICK, procedure=procedure), seed=0)
    assert bool((found.weight.dequantize()[[0, 7, 100]] == 0).all())
    assert bool((found.weight.scales[[0, 7, 100]] == 0).all())
    assert int((found.weight.scales == 0).sum()) == 3
    nothing = fit(torch.zeros_like(W), H, SMALL, replace(QUICK, procedure=procedure), seed=0)
    assert bool((nothing.weight.dequantize() == 0).all())
    assert nothing.relative_error == 0


@pytest.mark.parametrize("procedure", ["fast", "reference"])
def test_inputs_that_are_dead_or_few(procedure: str) -> None:
    W, H = layer()  # noqa: N806
    H[16:40] = 0
    H[:, 16:40] = 0
    settings = replace(QUICK, procedure=procedure)
    assert 0 < fit(W, H, SMALL, settings, seed=0).relative_error < 0.3
    few = torch.randn(20, 128, generator=torch.Generator().manual_seed(0))  # tokens: H has rank 20
    found = fit(W, few.T @ few, SMALL, settings, seed=0)
    assert found.relative_error == pytest.approx(error(W, found.weight.dequantize(), few.T @ few), rel=0.02)
    assert found.relative_error < 0.1
    none = fit(W, torch.zeros(128, 128), SMALL, settings, seed=0)
    assert none.relative_error == 0
    assert bool(torch.isfinite(none.weight.dequantize()).all())
    if procedure == "fast":
        assert "all zero" in none.notes[0]
        assert error(W, none.weight.dequantize(), torch.eye(128)) < 0.3


@pytest.mark.parametrize("magnitude", [1e-7, 1e-3, 1e4])
def test_small_and_large_weights_keep_their_digits(magnitude: float) -> None:
    W, H = layer()  # noqa: N806
    usual, other = (fit(each, H * scale, SMALL, QUICK, seed=0) for each, scale in ((W, 1.0), (W * magnitude, 1e-6)))
    assert other.relative_error == pytest.approx(usual.relative_error, rel=0.03)
    assert error(W * magnitude, other.weight.dequantize(torch.float64), H) == pytest.approx(
        other.relative_error, rel=0.01
    )


def test_as_many_groups_as_words() -> None:
    W, H = slow.weight(8, 32), slow.gram(32).float()  # noqa: N806
    scheme = AdditiveScheme(1, 5, 8)
    assert scheme.misfit(8, 32) is None
    found = fit(W, H, scheme, replace(QUICK, max_epochs=4), seed=0)
    assert found.relative_error < 0.05  # a word for each group
    with pytest.raises(ModelError, match="fewer than the 32 words"):
        fit(W[:7], H, scheme, QUICK, seed=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(value: float) -> None:
    for which, message in ((0, "The weight holds"), (1, "The Gram matrix of the inputs holds")):
        parts = [part.clone() for part in layer()]
        parts[which][3, 5] = value
        with pytest.raises(ModelError, match=message):
            fit(parts[0], parts[1], SMALL, QUICK, seed=0)


def test_what_does_not_fit_is_refused() -> None:
    W, H = layer()  # noqa: N806
    with pytest.raises(ModelError, match="64 x 64|has 128 inputs"):
        fit(W, H[:64, :64], SMALL, QUICK, seed=0)
    with pytest.raises(ModelError, match="in_group_size 48 does not divide"):
        fit(W, H, AdditiveScheme(2, 5, 48), QUICK, seed=0)
    with pytest.raises(ModelError, match="too large for float16"):
        fit(W * 1e12, H, SMALL, QUICK, seed=0)
    with pytest.raises(ModelError, match="negative diagonal"):
        fit(W, -H, SMALL, QUICK, seed=0)


def test_weights_of_one_value() -> None:
    found = fit(torch.full((64, 64), 0.25), slow.gram(64).float(), SMALL, QUICK, seed=0)
    assert found.relative_error < 1e-4
    assert math.isclose(float(found.weight.dequantize().mean()), 0.25, rel_tol=1e-3)
