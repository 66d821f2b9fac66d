"""Statistics of paired measurements: the same windows, questions or repetitions seen by two models.

Most of the spread of a perplexity comes from easy and hard text, which both models share. The interval of
the *difference* is therefore computed from differences, window by window and question by question.
Windows and questions are treated as independent draws from the kind of text they represent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Z95 = 1.959963984540054
MIN_WINDOWS = 8
"""Below this many windows a variance estimate says too little for an interval."""

_Array = NDArray[np.float64]


def t95(freedom: int) -> float:
    """97.5 % quantile of Student's t, by its expansion around the normal quantile (Abramowitz and Stegun 26.7.5).

    The error is below 0.003 from 6 degrees of freedom on, and below 0.01 from 4.
    """
    z, v = Z95, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def corpus_perplexity(nll: Sequence[float]) -> float:
    """Perplexity of all tokens: exp of the mean NLL, for windows of equal length."""
    return math.exp(math.fsum(nll) / len(nll))


def running_perplexities(nll: Sequence[float]) -> _Array:
    """Perplexity of windows 1 to i, for every i."""
    values = np.asarray(nll, dtype=np.float64)
    return np.exp(np.cumsum(values) / np.arange(1, len(values) + 1))


def mean_running_perplexity(nll: Sequence[float]) -> float:
    """Mean of the running perplexities: the headline number of the guides' script."""
    return float(running_perplexities(nll).mean())


def corpus_gradient(nll: Sequence[float]) -> _Array:
    """Derivative of the corpus perplexity by each window's NLL."""
    return np.full(len(nll), corpus_perplexity(nll) / len(nll))


def running_gradient(nll: Sequence[float]) -> _Array:
    """Derivative of the mean of running perplexities by each window's NLL.

    With P_i the running perplexity, dT/dx_j = 1/n sum_{i >= j} P_i / i: early windows count far more.
    """
    running = running_perplexities(nll)
    n = len(running)
    return np.cumsum((running / np.arange(1, n + 1))[::-1])[::-1] / n


def corpus_stderr(nll: Sequence[float]) -> float | None:
    """Standard error of the corpus perplexity by the delta method; None below `MIN_WINDOWS` windows."""
    return _delta_stderr(_influence(nll, corpus_gradient(nll)))


def running_stderr(nll: Sequence[float]) -> float | None:
    """Standard error of the mean of running perplexities; None below `MIN_WINDOWS` windows."""
    return _delta_stderr(_influence(nll, running_gradient(nll)))


def perplexity_interval(baseline: Sequence[float], quantized: Sequence[float], *, running: bool) -> Interval | None:
    """95 % interval of quantized minus baseline perplexity, from the NLL of the same windows.

    The delta method: each window's influence on the difference is its gradient times its deviation from the
    mean NLL, for the quantized model minus for the baseline; the variance is the sum of their squares.

    Args:
        baseline: NLL per window, nats per token.
        quantized: The same windows' NLL under the quantized model.
        running: For the mean of running perplexities instead of the corpus perplexity.

    Returns:
        The interval, or None below `MIN_WINDOWS` windows.
    """
    statistic = mean_running_perplexity if running else corpus_perplexity
    gradient = running_gradient if running else corpus_gradient
    influence = _influence(quantized, gradient(quantized)) - _influence(baseline, gradient(baseline))
    stderr = _delta_stderr(influence)
    if stderr is None:
        return None
    difference = statistic(quantized) - statistic(baseline)
    margin = t95(len(baseline) - 1) * stderr
    return difference - margin, difference + margin


def mean_stderr(samples: Sequence[float]) -> float | None:
    """Standard error of the mean of a number per window; None below `MIN_WINDOWS` windows."""
    values = np.asarray(samples, dtype=np.float64)
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) >= MIN_WINDOWS else None


def distance_interval(baseline: Sequence[float], quantized: Sequence[float]) -> Interval | None:
    """95 % interval of the mean difference of a number per window that is never below the baseline's.

    Student's t of the differences, cut at 0. None below `MIN_WINDOWS` windows, and where all differences are equal:
    without any spread nothing is known of it.
    """
    difference = np.asarray(quantized, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    stderr = mean_stderr(difference.tolist())
    if not stderr:
        return None
    mean, margin = float(difference.mean()), t95(len(difference) - 1) * stderr
    return max(0.0, mean - margin), mean + margin


def accuracy_interval(baseline: Sequence[float], quantized: Sequence[float]) -> Interval | None:
    """95 % interval of the difference of two mean scores of the same questions.

    For right/wrong scores: Bonett and Price 2012 (J. Educational and Behavioral Statistics 37), the Wald interval
    after adding one flip in each direction, so that few or no flips do not give an interval of width zero.
    For other scores: Student's t of the differences. None below five questions.
    """
    b, q = np.asarray(baseline, dtype=np.float64), np.asarray(quantized, dtype=np.float64)
    n = len(b)
    if n < 5:
        return None
    if np.isin(b, (0, 1)).all() and np.isin(q, (0, 1)).all():
        gained, lost = float(((q == 1) & (b == 0)).sum()), float(((q == 0) & (b == 1)).sum())
        centre = (gained - lost) / (n + 2)
        variance = (gained + lost + 2) / (n + 2) - centre**2
        margin = Z95 * math.sqrt(variance / (n + 2))
        return centre - margin, centre + margin
    difference = q - b
    margin = t95(n - 1) * float(difference.std(ddof=1)) / math.sqrt(n)
    return float(difference.mean()) - margin, float(difference.mean()) + margin


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Distribution-free interval of the median from order statistics.

    Returns:
        (low, high, confidence): the narrowest symmetric pair of order statistics with at least 95 %
        confidence; with fewer than six values the extremes, whose confidence 1 - 2^(1-n) is lower.
    """
    ordered = sorted(values)
    n = len(ordered)
    cut, tail = 0, 0.5**n
    while True:
        wider = tail + math.comb(n, cut + 1) * 0.5**n
        if cut + 1 >= n / 2 or 1 - 2 * wider < 0.95:
            break
        cut, tail = cut + 1, wider
    return ordered[cut], ordered[n - 1 - cut], 1 - 2 * tail


def median_difference_interval(
    baseline: Sequence[float], quantized: Sequence[float], *, seed: int = 0, draws: int = 4000
) -> Interval:
    """95 % percentile bootstrap of the difference of medians, redrawing repetitions in pairs."""
    b, q = np.asarray(baseline, dtype=np.float64), np.asarray(quantized, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(b), size=(draws, len(b)))  # (draws, repetitions)
    difference = np.median(q[picks], axis=1) - np.median(b[picks], axis=1)
    low, high = np.quantile(difference, (0.025, 0.975))
    return float(low), float(high)


def _influence(nll: Sequence[float], gradient: _Array) -> _Array:
    values = np.asarray(nll, dtype=np.float64)
    return gradient * (values - values.mean())


def _delta_stderr(influence: _Array) -> float | None:
    n = len(influence)
    if n < MIN_WINDOWS:
        return None
    return float(np.sqrt((influence**2).sum() * n / (n - 1)))
