"""Codes for all groups by error feedback: GPTQ's procedure (LDLQ) with sums of codewords in place of a grid.

A group's error is handed on to the groups still to come, so that they make up for it (`Metric` says how). Of each row
the best few codings so far (a beam) are kept; rows are independent.
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
    out, width, G = *V.shape, metric.size  # noqa: N806
    codes = []
    settled = torch.zeros_like(V)  # of each group's t_j, what the groups before it have left there
    x = V.new_ones(G + 1, out)
    target = x[:G]
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        whitened = metric.T[first:end].mT @ V[:, a:b].T.view(-1, G, out)  # V_j T_jj, (block / G, G, out)
        own, reach = settled[:, a:b].T.contiguous(), metric.reach[a:b, a:]  # (block, out), (block, in - a)
        errors = []  # D_j T_jj
        for j, v in enumerate(whitened.unbind()):
            at, to = j * G, (j + 1) * G
            torch.add(v, own[at:to], out=target)
            code, rest = encoder.encode(x, j)
            error = rest[0].T - own[at:to]
            codes.append(code)
            errors.append(error)
            if to < b - a:
                own[to:].addmm_(reach[at:to, to : b - a].T, error)
        if b < width:
            settled[:, b:].addmm_(torch.cat(errors).T, reach[:, b - a :])
    return torch.stack([torch.cat(each).T for each in zip(*codes, strict=True)], 2)


def _beam(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int, beam: int) -> Tensor:  # noqa: N803
    out, width, G = *V.shape, metric.size  # noqa: N806
    settled = V.new_zeros(beam * out, width)  # path p of row o is row p * out + o
    loss = torch.full((beam, out), torch.inf, device=V.device)
    loss[0] = 0  # all paths start alike: one is enough
    row = torch.arange(out, device=V.device)
    codes, parents = [], []
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        whitened = V[:, a:b].view(out, -1, G).transpose(0, 1) @ metric.T[first:end]  # (block / G, out, G)
        own, reach = settled[:, a:b].contiguous(), metric.reach[a:b, a:]
        errors = torch.zeros_like(own)
        origin = torch.arange(beam * out, device=V.device)
        for j, v in enumerate(whitened.unbind()):
            at, to = j * G, (j + 1) * G
            x = torch.nn.functional.pad(v.repeat(beam, 1) + own[:, at:to], (0, 1), value=1.0)
            found, rest = encoder.encode(x.T, j, keep=beam)  # (beam, beam * out, ...): next words of each path
            total = loss + torch.linalg.vecdot(rest, rest).view(beam, beam, out)
            loss, chosen = ranked(total.flatten(0, 1), beam)  # (beam, out)
            parent = ((chosen % beam) * out + row).flatten()
            chosen = (chosen * out + row).flatten()
            codes.append(torch.stack([code.flatten()[chosen] for code in found], 1))
            parents.append(parent)
            own, errors, origin = own[parent], errors[parent], origin[parent]
            error = torch.sub(rest.reshape(-1, G)[chosen], own[:, at:to], out=errors[:, at:to])
            if to < b - a:
                own[:, to:].addmm_(error, reach[at:to, to : b - a])
        if b < width:
            settled = settled[origin]
            settled[:, b:].addmm_(errors, reach[:, b - a :])
    return _trace(codes, parents, row)


def _trace(codes: list[Tensor], parents: list[Tensor], at: Tensor) -> Tensor:
    """Follow the best path of each row back to its start."""
    path = []
    for code, parent in zip(reversed(codes), reversed(parents), strict=True):
        path.append(code[at])
        at = parent[at]
    return torch.stack(path[::-1], 1)
