"""Codes for all groups by error feedback: GPTQ's procedure (LDLQ) with sums of codewords in place of a grid.

A group's error is handed on to the groups still to come, so that they make up for it. Of each row the best few codings
so far (a beam) are kept; rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.encode import Encoder
from backend.quantize.aqlm.metric import Metric
from backend.quantize.aqlm.nearest import ranked

CHUNK = 2**25  # weights times paths that are coded at a time: bounds memory


def feed_back(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int, beam: int = 1) -> Tensor:  # noqa: N803
    """Code a scaled weight.

    Args:
        V: (out, in), its inputs in the metric's order, divided by its rows' scales.
        metric: Of the inputs.
        codebooks: C, (K, M, G).
        candidates: As for `Encoder`.
        beam: Codings of a row that are kept; more than `candidates` count as that many.

    Returns:
        Codes (out, in / G, K), int32.
    """
    beam = min(beam, candidates, codebooks.shape[1])
    rows = max(1, CHUNK // (V.shape[1] * beam))
    if beam == 1:
        return torch.cat([_single(part, metric, codebooks, candidates) for part in V.split(rows)])
    return torch.cat([_beam(part, metric, codebooks, candidates, beam) for part in V.split(rows)])


def _single(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int) -> Tensor:  # noqa: N803
    G, codes = metric.size, []  # noqa: N806
    V = V.clone()  # noqa: N806
    x = V.new_ones(G + 1, len(V))
    target = x[:G]
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        own, U = V[:, a:b].T.contiguous(), metric.U[a:b, a:]  # (block, out), (block, in - a)  # noqa: N806
        errors = []
        for j, whiten in enumerate(metric.T[first:end].mT.unbind()):
            at, to = j * G, (j + 1) * G
            torch.mm(whiten, own[at:to], out=target)
            code, error = encoder.encode(x, j)
            codes.append(code)
            errors.append(error[0])
            if to < b - a:
                own[to:].addmm_(U[at:to, to : b - a].T, error[0].T, alpha=-1)
        if b < V.shape[1]:
            V[:, b:].addmm_(torch.cat(errors, 1), U[:, b - a :], alpha=-1)
    return torch.stack([torch.cat(each).T for each in zip(*codes, strict=True)], 2)


def _beam(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int, beam: int) -> Tensor:  # noqa: N803
    out, width = V.shape
    G = metric.size  # noqa: N806
    V = V.repeat(beam, 1)  # noqa: N806 - path p of row o is row p * out + o
    loss = torch.full((beam, out), torch.inf, device=V.device)
    loss[0] = 0  # all paths start alike: one is enough
    row = torch.arange(out, device=V.device)
    codes, parents = [], []
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        own, U = V[:, a:b].contiguous(), metric.U[a:b, a:]  # noqa: N806
        errors = torch.zeros_like(own)
        origin = torch.arange(out * beam, device=V.device)
        for j in range(end - first):
            at, to = j * G, (j + 1) * G
            x = torch.nn.functional.pad(own[:, at:to] @ metric.T[first + j], (0, 1), value=1.0)
            found, error = encoder.encode(x.T, j, keep=beam)  # (beam, beam * out, ...): next words of each path
            total = loss + torch.linalg.vecdot(error, error).view(beam, beam, out)
            loss, chosen = ranked(total.flatten(0, 1), beam)  # (beam, out)
            parent = ((chosen % beam) * out + row).flatten()
            chosen = (chosen * out + row).flatten()
            codes.append(torch.stack([code.flatten()[chosen] for code in found], 1))
            parents.append(parent)
            own, errors, origin = own[parent], errors[parent], origin[parent]
            error = error.reshape(-1, G)[chosen]
            errors[:, at:to] = error
            if to < b - a:
                own[:, to:].addmm_(error, U[at:to, to : b - a], alpha=-1)
        if b < width:
            V = V[origin]  # noqa: N806
            V[:, b:].addmm_(errors, U[:, b - a :], alpha=-1)
    return _trace(codes, parents, row)


def _trace(codes: list[Tensor], parents: list[Tensor], at: Tensor) -> Tensor:
    """Follow the best path of each row back to its start."""
    path = []
    for code, parent in zip(reversed(codes), reversed(parents), strict=True):
        path.append(code[at])
        at = parent[at]
    return torch.stack(path[::-1], 1)
