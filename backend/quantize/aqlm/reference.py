"""The published procedure: residual k-means, then Adam on codebooks and scales in turn with a beam search over codes.

Source: Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization" (arXiv
2401.06118), sections 3.1 to 3.3, with the constants of its published program. What differs: the products of errors and
H are float32 and kept up to date instead of computed anew, and of all rounds the best is returned instead of the last.
Both make it faster or better, never slower or worse.
"""

from __future__ import annotations

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
) -> tuple[AdditiveWeight, tuple[str, ...]]:
    """The best codes, codebooks and scales of all rounds; and notes.

    Args:
        W: (out, in), float32.
        H: (in, in).
        scheme: Which codebooks.
        settings: How hard to try.
        generator: On the device of W.

    Raises:
        ModelError: If the loss is not finite any more.
    """
    out, M = len(W), scheme.words  # noqa: N806
    H = H / H.diagonal().mean().clamp_min(torch.finfo(H.dtype).tiny)  # noqa: N806
    scales = torch.linalg.vector_norm(W, dim=1) + EPSILON
    codebooks, raw = _residual_kmeans(W / scales.unsqueeze(1), scheme, settings, generator)
    parameters = [torch.nn.Parameter(codebooks), torch.nn.Parameter(scales)]
    codebooks, scales = (parameter.data for parameter in parameters)
    adam = torch.optim.Adam(parameters, lr=settings.lr, betas=BETAS, amsgrad=True)
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for _ in range(settings.max_epochs):
        codes = Codes(raw, M)
        for step in range(settings.steps_per_epoch):
            Q = codes.gather(codebooks)  # noqa: N806
            D = torch.addcmul(-W, Q, scales.unsqueeze(1))  # noqa: N806
            G = D @ H  # noqa: N806
            if step == 0:
                loss = float(torch.linalg.vecdot(G, D).sum()) / out
                if loss != loss or loss == float("inf"):
                    raise ModelError(f"The search diverged, its loss is {loss}; lower lr ({settings.lr:g}).")
                if best is None or loss < best[0]:
                    previous, best = best, (loss, raw, codebooks.clone(), scales.clone())
                    enough = previous is not None and _too_little(loss, previous[0], settings)
                else:
                    enough = settings.relative_mse_tolerance is not None
                if enough:
                    return AdditiveWeight(*best[1:]), ()
            G *= 2 / out
            parameters[1].grad = torch.linalg.vecdot(G, Q)
            parameters[0].grad = codes.scatter(G.mul_(scales.unsqueeze(1)))
            adam.step()
        raw = beam_search(W, H, raw, codebooks, scales, settings.beam_size, generator)
    D = Codes(raw, M).gather(codebooks) * scales.unsqueeze(1) - W  # noqa: N806
    loss = float(torch.linalg.vecdot(D @ H, D).sum()) / out
    if best is None or loss < best[0]:
        best = (loss, raw, codebooks, scales)
    return AdditiveWeight(*best[1:]), ()


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
