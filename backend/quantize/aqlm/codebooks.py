"""The best codebooks for given codes: a linear least-squares problem, solved by preconditioned conjugate gradients.

With row scales s and V the scaled weight, the loss is the sum over rows o of s_o^2 (V - Q)_o H (V - Q)_o^T, and Q is
linear in the codebooks. Source of the method: Hestenes and Stiefel 1952; the preconditioner is the G x G block of each
codeword.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.metric import diagonal_blocks

GAIN = 1e-3  # an iteration that gains less than this part of the best one is the last
RIDGE = 1e-6  # of a codeword's mean diagonal: words that few groups use have singular blocks


def fit_codebooks(
    codebooks: Tensor,
    codes: Codes,
    weights: Tensor,
    R: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    steps: int,
) -> Tensor:
    """Improve codebooks.

    Args:
        codebooks: C to start from, (K, M, G).
        codes: Codes of the rows, (out, in / G, K).
        weights: Squares of the rows' scales, (out,).
        R: (V - Q) H of the rows under C, (out, in).
        H: Damped Gram matrix, (in, in).
        steps: Iterations at most.
    """
    weights = weights.unsqueeze(1)
    inverse = _preconditioner(codes, weights, H)
    r = codes.scatter(R * weights)
    z = _apply(inverse, r)
    p, rz = z, (r * z).sum()
    best = 0.0
    for step in range(steps):
        Ap = codes.scatter((codes.gather(p) @ H).mul_(weights))  # noqa: N806
        curvature = (p * Ap).sum()
        if not float(curvature) > 0:
            break
        alpha = rz / curvature
        codebooks = codebooks + alpha * p
        gain = float(alpha * rz)
        best = max(best, gain)
        if gain <= GAIN * best or step + 1 == steps:
            break
        r = r - alpha * Ap
        z = _apply(inverse, r)
        before, rz = rz, (r * z).sum()
        p = z + (rz / before) * p
    return codebooks


def _preconditioner(codes: Codes, weights: Tensor, H: Tensor) -> Tensor:  # noqa: N803
    """Inverses of the codewords' own blocks, (K, M, G, G); zero for words that are not used."""
    G = H.shape[0] // codes.shape[1]  # noqa: N806
    blocks = codes.scatter_places(diagonal_blocks(H, G).flatten(1), weights).unflatten(2, (G, G)).double()
    mean = blocks.diagonal(dim1=2, dim2=3).mean(2)
    used = mean > 0
    eye = torch.eye(G, dtype=blocks.dtype, device=blocks.device)
    blocks += torch.where(used, mean * RIDGE, 1.0)[..., None, None] * eye
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(blocks)[0])
    return torch.where(used[..., None, None], inverse, 0.0).to(H.dtype)


def _apply(inverse: Tensor, r: Tensor) -> Tensor:
    return (inverse @ r.unsqueeze(3)).squeeze(3)


def fit_scales(scales: Tensor, Q: Tensor, QH: Tensor, R: Tensor) -> Tensor:  # noqa: N803
    """The best scale of each row for given codes and codebooks, (w H q) / (q H q).

    With V the weight divided by `scales` that is `scales` times 1 + (R q) / (q H q), which needs R only as exactly as R
    is small.

    Args:
        scales: Those so far, (out,); kept where the best is no positive number.
        Q: Sums of codewords, (out, in).
        QH: Q H.
        R: (V - Q) H.
    """
    best = scales * (1 + torch.linalg.vecdot(R, Q) / torch.linalg.vecdot(QH, Q))
    return torch.where(torch.isfinite(best) & (best > 0), best, scales)
