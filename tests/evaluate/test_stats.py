"""Intervals: against closed forms, numerical derivatives and simulated coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from backend.evaluate import stats


def test_student_quantile_matches_tables() -> None:
    for freedom, expected in [(6, 2.447), (7, 2.365), (10, 2.228), (30, 2.042), (200, 1.972)]:
        assert stats.t95(freedom) == pytest.approx(expected, abs=3e-3)


def test_running_perplexity_of_equal_windows_is_their_perplexity() -> None:
    assert stats.mean_running_perplexity([math.log(7.0)] * 9) == pytest.approx(7.0)
    assert stats.running_perplexities([math.log(4.0), math.log(16.0)]) == pytest.approx([4.0, 8.0])


@pytest.mark.parametrize("running", [False, True])
def test_gradients_equal_finite_differences(running: bool) -> None:
    nll = np.random.default_rng(0).normal(2.0, 0.5, 12)
    value = stats.mean_running_perplexity if running else stats.corpus_perplexity
    gradient = stats.running_gradient(nll) if running else stats.corpus_gradient(nll)
    for j in range(len(nll)):
        up, down = nll.copy(), nll.copy()
        up[j] += 1e-6
        down[j] -= 1e-6
        assert gradient[j] == pytest.approx((value(up) - value(down)) / 2e-6, rel=1e-6)


@pytest.mark.parametrize("running", [False, True])
def test_paired_interval_covers_the_true_difference_and_beats_unpaired(running: bool) -> None:
    """500 texts of 60 windows: text difficulty varies a lot, the damage of quantization little."""
    random = np.random.default_rng(1)
    value = stats.mean_running_perplexity if running else stats.corpus_perplexity
    difficulty = random.normal(2.0, 0.4, (500, 60))
    damage = random.normal(0.05, 0.03, (500, 60))
    truth = float(np.mean([value(d + h) - value(d) for d, h in zip(difficulty, damage, strict=True)]))
    inside, widths = 0, []
    for base, harm in zip(difficulty, damage, strict=True):
        low, high = stats.perplexity_interval(base, base + harm, running=running) or (0.0, 0.0)
        inside += low <= truth <= high
        widths.append(high - low)
    assert 0.88 <= inside / 500 <= 0.99  # nominal 95 %; 500 draws have a standard error of 1 %
    unpaired = 2 * 1.96 * math.sqrt(2) * np.mean([stats.corpus_stderr(d) or 0.0 for d in difficulty])
    assert np.mean(widths) < unpaired / 3


def test_too_few_windows_give_no_interval() -> None:
    assert stats.perplexity_interval([1.0] * 7, [1.1] * 7, running=False) is None
    assert stats.corpus_stderr([1.0] * 7) is None


def test_accuracy_interval_without_flips_is_not_a_point() -> None:
    low, high = stats.accuracy_interval([1.0] * 50 + [0.0] * 50, [1.0] * 50 + [0.0] * 50) or (0.0, 0.0)
    assert low == pytest.approx(-high)
    assert 0.01 < high < 0.05  # the rule of three for 100 questions says 0.03


def test_accuracy_interval_covers_the_true_difference() -> None:
    random = np.random.default_rng(2)
    inside = 0
    for _ in range(1000):
        base = (random.random(120) < 0.7).astype(float)
        lost, gained = random.random(120) < 0.10, random.random(120) < 0.05
        quantized = np.where(lost & (base == 1), 0.0, np.where(gained & (base == 0), 1.0, base))
        low, high = stats.accuracy_interval(base, quantized) or (0.0, 0.0)
        inside += low <= -0.7 * 0.10 + 0.3 * 0.05 <= high
    assert 0.94 <= inside / 1000 <= 0.99


def test_graded_scores_use_the_differences() -> None:
    base = [0.2, 0.4, 0.6, 0.8, 0.9, 0.1]
    low, high = stats.accuracy_interval(base, [b + 0.05 for b in base]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((0.05, 0.05))


@pytest.mark.parametrize(("n", "expected", "least"), [(3, (1, 3), 0.75), (6, (1, 6), 0.96), (9, (2, 8), 0.96)])
def test_median_interval_uses_order_statistics(n: int, expected: tuple[int, int], least: float) -> None:
    low, high, confidence = stats.median_interval([float(i) for i in range(n, 0, -1)])
    assert (low, high) == expected
    assert least <= confidence < 1


def test_bootstrap_of_medians_is_paired_and_seeded() -> None:
    base = [10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0]
    low, high = stats.median_difference_interval(base, [b + 3 for b in base])
    assert (low, high) == pytest.approx((3.0, 3.0))  # the repetitions vary, their differences do not
    noisy = [11.0, 19.0, 35.0, 41.0, 48.0, 66.0, 71.0]
    assert stats.median_difference_interval(base, noisy) == stats.median_difference_interval(base, noisy)
