"""The published procedure: residual k-means, then Adam on codebooks and scales in turn with a beam search over codes.

Source: Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization" (arXiv
2401.06118), sections 3.1 to 3.3, with the constants of its published program. What differs makes it faster or better:
products are float32 instead of float64, the beam search keeps the products of errors and H instead of computing them
anew for every code, the nearest words of k-means are found as quickly as in the fast procedure, and of all rounds the
best is returned instead of the last.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from backend.errors import ModelError
from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.beam_search import beam_search
from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.nearest import distance_table, nearest
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme

BETAS = (0.0, 0.95)
EPSILON = 1e-9  # beside a row's norm
CHECK_EVERY = 10  # iterations of k-means between checks for convergence


def search_reference(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    scheme: AdditiveScheme,
    settings: SearchSettings,
    generator: torch.Generator,
) -> AdditiveWeight:
    """The best codes, codebooks and scales of all rounds.

    Args:
        W: (out, in), float32. Adam's steps are absolute, so its magnitude matters.
        H: (in, in).
        scheme: Which codebooks.
        settings: How hard to try.
        generator: On the device of W.

    Raises:
        ModelError: If the loss is not finite any more.
    """
    M = scheme.words  # noqa: N806
    H = H / H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny)  # noqa: N806
    scales = torch.linalg.vector_norm(W, dim=1) + EPSILON
    codebooks, raw = _residual_kmeans(W / scales.unsqueeze(1), scheme, settings, generator)
    parameters = [torch.nn.Parameter(codebooks), torch.nn.Parameter(scales)]
    codebooks, scales = (parameter.data for parameter in parameters)
    adam = torch.optim.Adam(parameters, lr=settings.lr, betas=BETAS, amsgrad=True)
    best, tolerance, epoch = (math.inf, AdditiveWeight(raw, codebooks, scales)), settings.relative_mse_tolerance, 0
    while True:
        codes = Codes(raw, M)
        loss = float(loss_and_gradients(W, H, codes, codebooks, scales)[0])
        if not math.isfinite(loss):
            raise ModelError(f"The search diverged, its loss is {loss}; lower lr ({settings.lr:g}).")
        enough = tolerance is not None and loss > best[0] * (1 - tolerance)
        if loss < best[0]:
            best = loss, AdditiveWeight(raw, codebooks.clone(), scales.clone())
        if enough or epoch == settings.max_epochs:
            return best[1]
        for _ in range(settings.steps_per_epoch):
            _, (parameters[0].grad, parameters[1].grad) = loss_and_gradients(W, H, codes, codebooks, scales)
            adam.step()
        raw = beam_search(W, H, raw, codebooks, scales, settings.beam_size, generator)
        epoch += 1


def loss_and_gradients(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    codes: Codes,
    codebooks: Tensor,
    scales: Tensor,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The loss, tr(D H D^T) / out, and its gradients with respect to codebooks (K, M, G) and scales (out,)."""
    Q, rows = codes.gather(codebooks), scales.unsqueeze(1)  # noqa: N806
    D = torch.addcmul(-W, Q, rows)  # noqa: N806
    DH = D @ H  # noqa: N806
    loss = torch.linalg.vecdot(DH, D).sum() / len(W)
    DH *= 2 / len(W)
    by_scale = torch.linalg.vecdot(DH, Q)
    return loss, (codes.scatter(DH.mul_(rows)), by_scale)


def _too_little(loss: float, before: float, settings: SearchSettings) -> bool:
    tolerance = settings.relative_mse_tolerance
    return tolerance is not None and loss > before * (1 - tolerance)


def _residual_kmeans(
    V: Tensor,  # noqa: N803
    scheme: AdditiveScheme,
    settings: SearchSettings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Codebooks (K, M, G) and codes (out, in / G, K) of plain k-means on the groups, codebook by codebook."""
    G, M, points = scheme.in_group_size, scheme.words, settings.init_max_points_per_centroid  # noqa: N806
    rest = V.reshape(-1, G)
    codebooks, codes = [], []
    for _ in range(scheme.num_codebooks):
        sample = rest
        if points is not None and points * M < len(rest):
            sample = rest[torch.randperm(len(rest), generator=generator, device=rest.device)[: points * M]]
        words = _kmeans(sample, M, settings.init_max_iter, generator)
        nearest = _nearest(rest, words)
        rest = rest - words[nearest]
        codebooks.append(words)
        codes.append(nearest)
    return torch.stack(codebooks), torch.stack(codes, 1).view(len(V), -1, len(codes)).int()


def _kmeans(x: Tensor, count: int, iterations: int, generator: torch.Generator) -> Tensor:
    """Lloyd's k-means from random points; a cluster without points stays where it is."""
    words = x[torch.randperm(len(x), generator=generator, device=x.device)[:count]]
    for iteration in range(1, iterations + 1):
        nearest = Codes(_nearest(x, words).view(-1, 1, 1), count)
        sizes = nearest.scatter(torch.ones_like(x[:, :1]))[0]
        means = torch.where(sizes > 0, nearest.scatter(x)[0] / sizes.clamp_min(1), words)
        settled = iteration % CHECK_EVERY == 0 and torch.allclose(means, words, rtol=1e-6, atol=1e-8)
        words = means
        if settled:
            break
    return words


def _nearest(x: Tensor, words: Tensor) -> Tensor:
    """Index of the nearest word of each point, (N, G) and (M, G) -> (N,) int32."""
    x = torch.nn.functional.pad(x, (0, 1), value=1.0)
    return nearest(distance_table(words), x.T)[1].squeeze(0)
