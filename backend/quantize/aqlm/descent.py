"""Coordinate descent over codes: each group in turn gets the best sum of codewords, all others held fixed.

Known as iterated conditional modes (Besag 1986). The product R of error and H is kept up to date, so a group's best
real-valued weights are known at every visit: those it has, plus R_j H_jj^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.encode import Encoder
from backend.quantize.aqlm.metric import Metric


def descend(codes: Tensor, R: Tensor, metric: Metric, codebooks: Tensor, candidates: int) -> tuple[Tensor, Tensor]:  # noqa: N803
    """Visit all groups once. No change raises a row's loss.

    Args:
        codes: (out, in / G, K), int32.
        R: (V - Q) H under these codes, (out, in); overwritten.
        metric: Of the inputs.
        codebooks: C, (K, M, G).
        candidates: As for `Encoder`.

    Returns:
        New codes, and R under them.
    """
    G, table = metric.size, codebooks  # noqa: N806
    result = codes.clone()
    for first, end in metric.blocks():
        a, b = first * G, end * G
        L = metric.L[first:end]  # noqa: N806
        encoder = Encoder(table, L, candidates)
        own, H = R[:, a:b].contiguous(), metric.H[a:b]  # noqa: N806
        eye = torch.eye(G, device=L.device)
        inverse = torch.linalg.solve_triangular(L, eye, upper=False)  # L^-1
        changes = torch.empty_like(own)
        for j in range(end - first):
            at, to = j * G, (j + 1) * G
            before = result[:, first + j]
            miss = own[:, at:to] @ inverse[j].T  # from the current sum to the best weights, whitened
            current = encoder.sums(before, j)
            found, error = encoder.encode(current + miss, j)
            better = error < torch.linalg.vecdot(miss, miss).unsqueeze(1)
            after = torch.where(better, found[:, 0], before)
            change = torch.mm(encoder.sums(after, j).sub_(current), inverse[j], out=changes[:, at:to])
            result[:, first + j] = after
            own.addmm_(change, H[at:to, a:b], alpha=-1)
        R.addmm_(changes, H, alpha=-1)
    return result, R
