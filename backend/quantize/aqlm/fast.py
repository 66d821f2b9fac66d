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

WARM_UP_CANDIDATES = 2
FIT_WEIGHTS = 2**20  # codebooks are fitted to rows of at least so many weights,
FIT_WEIGHTS_PER_ENTRY = 64  # and of at least so many per entry of a codebook; the others follow suit


def search_fast(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    scheme: AdditiveScheme,
    settings: SearchSettings,
    generator: torch.Generator,
) -> tuple[AdditiveWeight, tuple[str, ...]]:
    """The best codes, codebooks and scales of all rounds, by the loss on the undamped H; and notes.

    Args:
        W: (out, in), float32, of a magnitude around 1.
        H: (in, in).
        scheme: Which codebooks.
        settings: How hard to try.
        generator: On the device of W.
    """
    metric = metric_of(H, scheme.in_group_size, settings.damp, settings.act_order)
    search = _Search(metric.arrange(W), metric, settings, generator)
    search.start(scheme)
    best = search.improve_values()
    for _ in range(settings.max_epochs):
        search.improve_codes()
        state = search.improve_values()
        enough = settings.relative_mse_tolerance is not None and (
            state.loss > best.loss * (1 - settings.relative_mse_tolerance)
        )
        best = min(best, state, key=lambda each: each.loss)
        if enough:
            break
    codes = torch.empty_like(best.codes)
    codes[:, metric.groups] = best.codes
    return AdditiveWeight(codes, best.codebooks, best.scales), metric.notes


@dataclass(frozen=True)
class _State:
    loss: float
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
        self._WH = W @ metric.H
        self._scales = W.square().mean(1).sqrt()

    def start(self, scheme: AdditiveScheme) -> None:
        """First codebooks and first codes."""
        settings, metric = self._settings, self._metric
        V, weights = _divided(self._W, self._scales), self._scales.square()  # noqa: N806
        C = residual_kmeans(  # noqa: N806
            V, weights, metric, (scheme.num_codebooks, scheme.words),
            settings.init_max_points_per_centroid, settings.init_max_iter, self._generator,
        )  # fmt: skip
        for _ in range(settings.warm_ups):
            rows = self._draw_rows(settings.warm_up_rows)
            v = V[rows]
            codes = Codes(feed_back(v, metric, C, WARM_UP_CANDIDATES), scheme.words)
            R = (v - codes.gather(C)) @ metric.H  # noqa: N806
            C, _ = fit_codebooks(C, codes, weights[rows], R, metric.H, settings.steps_per_epoch)  # noqa: N806
        self._codebooks = C
        self._codes = feed_back(V, metric, C, settings.candidates, settings.beam_size)
        del V
        Q = Codes(self._codes, scheme.words).gather(C)  # noqa: N806
        self._R = _divided(self._WH, self._scales) - Q @ metric.H

    def improve_codes(self) -> None:
        """One pass of coordinate descent."""
        self._codes, self._R = descend(self._codes, self._R, self._metric, self._codebooks, self._settings.candidates)

    def improve_values(self) -> _State:
        """Codebooks, then scales, for the codes as they are."""
        H, C = self._metric.H, self._codebooks  # noqa: N806
        codes = Codes(self._codes, C.shape[1])
        weights, steps = self._scales.square(), self._settings.steps_per_epoch
        rows = self._draw_rows(max(FIT_WEIGHTS, FIT_WEIGHTS_PER_ENTRY * C.numel()) // len(H))
        if len(rows) == len(self._W):
            C, R = fit_codebooks(C, codes, weights, self._R, H, steps)  # noqa: N806
            Q = codes.gather(C)  # noqa: N806
            QH = _divided(self._WH, self._scales) - R  # noqa: N806
        else:
            some = Codes(self._codes[rows], C.shape[1])
            C, _ = fit_codebooks(C, some, weights[rows], self._R[rows], H, steps)  # noqa: N806
            Q = codes.gather(C)  # noqa: N806
            QH = Q @ H  # noqa: N806
        self._codebooks, self._scales = C, fit_scales(self._scales, self._WH, Q, QH)
        self._R = _divided(self._WH, self._scales).sub_(QH)
        D = _divided(self._W, self._scales).sub_(Q)  # noqa: N806
        losses = torch.linalg.vecdot(D, self._R) - self._metric.damp * torch.linalg.vecdot(D, D)
        loss = float((losses.double() * self._scales.double().square()).sum())
        return _State(loss, self._codes, C, self._scales)

    def _draw_rows(self, count: int) -> Tensor:
        """So many rows, or all."""
        out, device = len(self._W), self._W.device
        if count >= out:
            return torch.arange(out, device=device)
        return torch.randperm(out, generator=self._generator, device=device)[:count]


def _divided(rows: Tensor, scales: Tensor) -> Tensor:
    """Rows by their scales; rows of zeros, whose scale is 0, stay zeros."""
    return rows / torch.where(scales > 0, scales, 1.0).unsqueeze(1)
