"""The fast procedure: codes by error feedback, codebooks by conjugate gradients, then rounds of coordinate descent.

Error feedback with codes in place of a grid is LDLQ of Chee et al. 2023 (QuIP, arXiv 2307.13304) with a learnt vector
codebook. K-means does not see the targets that feedback makes, so the codebooks are first warmed up on a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.codebooks import fit_codebooks, fit_scales
from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.descent import descend
from backend.quantize.aqlm.feedback import feed_back
from backend.quantize.aqlm.kmeans import residual_kmeans
from backend.quantize.aqlm.metric import Metric, metric_of
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.gram import best_dtype, product

WARM_UP_CANDIDATES = 2  # more are hardly better: only the codebooks are kept
OVERSHOOT = 1.5  # warm-ups go so far beyond the best codebooks for their codes, which follow: fewer are needed
FIT_WEIGHTS_PER_ENTRY = 64  # weights per entry of the codebooks to which these are fitted; other rows follow suit
MIN_ROWS = 64  # however wide they are


def search_fast(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    scheme: AdditiveScheme,
    settings: SearchSettings,
    generator: torch.Generator,
) -> tuple[AdditiveWeight, float, tuple[str, ...]]:
    """The best codes, codebooks and scales of all rounds, by the loss on the undamped H.

    Args:
        W: (out, in), float32, of a magnitude around 1.
        H: (in, in).
        scheme: Which codebooks.
        settings: How hard to try.
        generator: On the device of W.

    Returns:
        The weight, with values of float16's precision; its relative error on the undamped H; and notes.
    """
    metric = metric_of(H, scheme.in_group_size, settings.damp, settings.act_order)
    search = _Search(metric.arrange(W), metric, settings, generator)
    search.start(scheme)
    best = search.improve_values()
    for _ in range(settings.max_epochs):
        search.improve_codes()
        state = search.improve_values()
        enough = settings.relative_mse_tolerance is not None and (
            state.error > best.error * (1 - settings.relative_mse_tolerance)
        )
        best = min(best, state, key=lambda each: each.error)
        if enough:
            break
    codes = torch.empty_like(best.codes)
    codes[:, metric.groups] = best.codes
    return AdditiveWeight(codes, best.codebooks, best.scales), best.error, metric.notes


@dataclass(frozen=True)
class _State:
    error: float
    codes: Tensor
    codebooks: Tensor
    scales: Tensor


class _Search:
    """A weight on its way.

    Args:
        W: In the metric's order.
        metric: Of the inputs.
        settings: How hard to try.
        generator: On the device of W.
    """

    def __init__(self, W: Tensor, metric: Metric, settings: SearchSettings, generator: torch.Generator) -> None:  # noqa: N803
        self._W, self._metric, self._settings, self._generator = W, metric, settings, generator
        fast = best_dtype(W.device)
        self._WH = product(W.to(fast), metric.H.to(fast)).float()  # only small multiples of it are ever used
        self._signal = self._energy(W, self._WH).sum()
        self._scales = W.square().mean(1).sqrt()

    def start(self, scheme: AdditiveScheme) -> None:
        """First codebooks and first codes."""
        settings, metric = self._settings, self._metric
        V = _divided(self._W, self._scales)  # noqa: N806
        self._codebooks = residual_kmeans(
            V, self._scales.square(), metric, (scheme.num_codebooks, scheme.words),
            settings.init_max_points_per_centroid, settings.init_max_iter, self._generator,
        )  # fmt: skip
        for _ in range(settings.warm_ups):
            rows = self._draw_rows(settings.warm_up_weights)
            v = V[rows]
            self._fit_codebooks(rows, v, feed_back(v, metric, self._codebooks, WARM_UP_CANDIDATES), OVERSHOOT)
        self._codes = feed_back(V, metric, self._codebooks, settings.candidates, settings.beam_size)

    def improve_codes(self) -> None:
        """One pass of coordinate descent."""
        self._codes = descend(self._codes, self._R, self._metric, self._codebooks, self._settings.candidates)

    def improve_values(self) -> _State:
        """Codebooks, then scales, for the codes as they are; both rounded to float16, as they will be stored."""
        V = _divided(self._W, self._scales)  # noqa: N806
        rows = self._draw_rows(FIT_WEIGHTS_PER_ENTRY * self._codebooks.numel())
        self._fit_codebooks(rows, V[rows], self._codes[rows])
        self._codebooks = self._codebooks.half().float()
        Q = Codes(self._codes, self._codebooks.shape[1]).gather(self._codebooks)  # noqa: N806
        D = V.sub_(Q)  # noqa: N806
        R = D @ self._metric.H  # noqa: N806
        before = self._scales
        self._scales = fit_scales(before, Q, _divided(self._WH, before).sub_(R), R).half().float()
        change = _inverse(self._scales) - _inverse(before)
        D.addcmul_(self._W, change)
        self._R = R.addcmul_(self._WH, change)
        error = (self._energy(D, R) * self._scales.double().square()).sum() / self._signal
        return _State(float(error), self._codes, self._codebooks, self._scales)

    def _energy(self, D: Tensor, DH: Tensor) -> Tensor:  # noqa: N803
        """Of each row with the undamped H, (out,), float64."""
        return torch.linalg.vecdot(D, DH).double() - self._metric.damp * torch.linalg.vecdot(D, D).double()

    def _fit_codebooks(self, rows: Tensor, v: Tensor, codes: Tensor, step: float = 1.0) -> None:
        """Codebooks for some rows, of scaled weights `v`; `step` is how far to go towards the best ones."""
        H, sums = self._metric.H, Codes(codes, self._codebooks.shape[1])  # noqa: N806
        R = (v - sums.gather(self._codebooks)) @ H  # noqa: N806
        weights = self._scales[rows].square()
        found = fit_codebooks(self._codebooks, sums, weights, R, H, self._settings.steps_per_epoch)
        self._codebooks = torch.lerp(self._codebooks, found, step)

    def _draw_rows(self, weights: int) -> Tensor:
        """Rows of about so many weights, or all."""
        out, device = len(self._W), self._W.device
        count = max(MIN_ROWS, weights // self._W.shape[1])
        if count >= out:
            return torch.arange(out, device=device)
        return torch.randperm(out, generator=self._generator, device=device)[:count]


def _inverse(scales: Tensor) -> Tensor:
    """Of scales (out,), as a column; for rows of zeros, whose scale is 0, one."""
    return (1 / torch.where(scales > 0, scales, 1.0)).unsqueeze(1)


def _divided(rows: Tensor, scales: Tensor) -> Tensor:
    return rows * _inverse(scales)
