"""Codes for all groups by error feedback: GPTQ's procedure (LDLQ) with sums of codewords in place of a grid.

A group's error is handed on to the groups still to come, so that they make up for it. Of each row the best few codings
so far (a beam) are kept; rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backend.quantize.aqlm.encode import Encoder, ranked
from backend.quantize.aqlm.metric import Metric

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
    run = _single if beam == 1 else _beam
    return torch.cat([run(part, metric, codebooks, candidates, beam) for part in V.split(rows)])


def _single(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int, beam: int) -> Tensor:  # noqa: N803
    G, codes = metric.size, []  # noqa: N806
    V = V.clone()  # noqa: N806
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        own, U = V[:, a:b].contiguous(), metric.U[a:b, a:]  # noqa: N806
        errors = torch.empty_like(own)
        for j in range(end - first):
            at, to = j * G, (j + 1) * G
            t = own[:, at:to] @ metric.T[first + j]
            code = encoder.encode(t, j)[0][:, 0]
            error = torch.sub(t, encoder.sums(code, j), out=errors[:, at:to])
            codes.append(code)
            if to < b - a:
                own[:, to:].addmm_(error, U[at:to, to : b - a], alpha=-1)
        if b < V.shape[1]:
            V[:, b:].addmm_(errors, U[:, b - a :], alpha=-1)
    return torch.stack(codes, 1)


def _beam(V: Tensor, metric: Metric, codebooks: Tensor, candidates: int, beam: int) -> Tensor:  # noqa: N803
    out, width = V.shape
    G, K = metric.size, codebooks.shape[0]  # noqa: N806
    V = V.repeat_interleave(beam, 0)  # noqa: N806 - path p of row o is row o * beam + p
    loss = torch.full((out, beam), torch.inf, device=V.device)
    loss[:, 0] = 0  # all paths start alike: one is enough
    row = torch.arange(out, device=V.device).unsqueeze(1) * beam
    codes, parents = [], []
    for first, end in metric.blocks():
        a, b = first * G, end * G
        encoder = Encoder(codebooks, metric.T[first:end], candidates)
        own, U = V[:, a:b].contiguous(), metric.U[a:b, a:]  # noqa: N806
        errors = torch.zeros_like(own)
        origin = torch.arange(out * beam, device=V.device)
        for j in range(end - first):
            at, to = j * G, (j + 1) * G
            t = own[:, at:to] @ metric.T[first + j]
            found, gained = encoder.encode(t, j, keep=beam)
            total = (loss.unsqueeze(2) + gained.view(out, beam, beam)).flatten(1)
            loss, chosen = ranked(total, beam)
            parent = (row + chosen // beam).flatten()
            code = found.view(out, beam * beam, K).gather(1, chosen.unsqueeze(2).expand(-1, -1, K)).view(-1, K)
            codes.append(code)
            parents.append(parent)
            own, errors, origin = own[parent], errors[parent], origin[parent]
            error = torch.sub(t[parent], encoder.sums(code, j), out=errors[:, at:to])
            if to < b - a:
                own[:, to:].addmm_(error, U[at:to, to : b - a], alpha=-1)
        if b < width:
            V = V[origin]  # noqa: N806
            V[:, b:].addmm_(errors, U[:, b - a :], alpha=-1)
    return _trace(codes, parents, row.flatten())


def _trace(codes: list[Tensor], parents: list[Tensor], at: Tensor) -> Tensor:
    """Follow the best path of each row back to its start."""
    path = []
    for code, parent in zip(reversed(codes), reversed(parents), strict=True):
        path.append(code[at])
        at = parent[at]
    return torch.stack(path[::-1], 1)
