"""Coordinate descent over codes: each group in turn gets the best sum of codewords, all others held fixed.

Known as iterated conditional modes (Besag 1986). The product R of error and H is kept up to date, so a group's best
real-valued weights are known at every visit: those it has, plus R_j H_jj^-1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.encode import Encoder
from backend.quantize.aqlm.metric import Metric


def descend(codes: Tensor, R: Tensor, metric: Metric, codebooks: Tensor, candidates: int) -> Tensor:  # noqa: N803
    """Visit all groups once. No change raises a row's loss.

    Args:
        codes: (out, in / G, K), int32.
        R: (V - Q) H under these codes, (out, in); overwritten with that under the new ones.
        metric: Of the inputs.
        codebooks: C, (K, M, G).
        candidates: As for `Encoder`.

    Returns:
        New codes.
    """
    G, visited = metric.size, []  # noqa: N806
    old = [code.unbind(1) for code in codes.unbind(2)]  # K times in / G times (out,)
    x = R.new_ones(G + 1, len(R))
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.L[first:end], candidates)
        own, H = R[:, a:b].T.contiguous(), metric.H[a:b]  # (block, out), (block, in)  # noqa: N806
        changes = torch.empty_like(own)
        for j, inverse in enumerate(metric.L_inverse[first:end].unbind()):
            at, to = j * G, (j + 1) * G
            before = [places[first + j] for places in old]
            miss = inverse @ own[at:to]  # from the current sum to the best weights, whitened, (G, out)
            torch.sub(miss, encoder.sums(before, j).T, out=x[:G])
            after, error = encoder.encode(x, j)
            better = torch.linalg.vecdot(error[0], error[0]) < miss.square().sum(0)
            visited.append([torch.where(better, new[0], code) for new, code in zip(after, before, strict=True)])
            change = torch.mm(inverse.T, miss.sub_(error[0].T).mul_(better), out=changes[at:to])
            own.addmm_(H[at:to, a:b].T, change, alpha=-1)
        R.addmm_(changes.T, H, alpha=-1)
    return torch.stack([torch.stack(each, 1) for each in zip(*visited, strict=True)], 2)
