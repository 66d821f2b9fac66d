"""The published beam search over codes: one codebook of one group at a time, in random order.

Every word is tried in the place of the one that is there, the loss of the whole row decides, and the best codings of
each row go on, across groups. Rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from backend.quantize.aqlm.codes import Codes
from backend.quantize.aqlm.metric import BLOCK
from backend.quantize.aqlm.nearest import ranked, smallest

CHUNK = 2**25  # weights times codings at a time: bounds memory


def beam_search(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    beam: int,
    generator: torch.Generator,
) -> Tensor:
    """Visit every code once.

    Args:
        W: (out, in).
        H: (in, in).
        codes: (out, in / G, K), int32.
        codebooks: (K, M, G).
        scales: (out,).
        beam: Codings of a row that are kept, at most M.
        generator: On the device of W.

    Returns:
        New codes; no row's loss is higher than before.
    """
    groups, K = codes.shape[1:]  # noqa: N806
    device, beam = W.device, min(beam, codebooks.shape[1])
    order = torch.randperm(groups, generator=generator, device=device)
    books = [torch.randperm(K, generator=generator, device=device).tolist() for _ in range(groups)]
    rows = max(1, CHUNK // (W.shape[1] * beam))
    parts = [
        _search(w, H, c, codebooks, s, beam, order, books)
        for w, c, s in zip(W.split(rows), codes.split(rows), scales.split(rows), strict=True)
    ]
    return torch.cat(parts)


def _search(
    W: Tensor,  # noqa: N803
    H: Tensor,  # noqa: N803
    codes: Tensor,
    codebooks: Tensor,
    scales: Tensor,
    beam: int,
    order: Tensor,
    books: list[list[int]],
) -> Tensor:
    out, width = W.shape
    K, M, G = codebooks.shape  # noqa: N806
    # The best coding so far is all of the beam at first: `loss`, relative to its own, keeps the others out.
    paths = 1
    codes = codes.clone()
    D = Codes(codes, M).gather(codebooks).mul_(-scales.unsqueeze(1)).add_(W)  # noqa: N806 - (out * paths, in)
    s = scales.unsqueeze(1)
    loss = torch.zeros(1, out, device=W.device)
    for block in order.split(max(1, BLOCK // G)):
        columns = (block.unsqueeze(1) * G + torch.arange(G, device=W.device)).flatten()
        own_H = H[columns][:, columns]  # noqa: N806
        R = D @ H[:, columns]  # noqa: N806 - (out * paths, block)
        changes = torch.zeros_like(R)
        origin = torch.arange(out * paths, device=W.device)
        for number, j in enumerate(block.tolist()):
            part = slice(number * G, (number + 1) * G)
            H_j = own_H[part, part]  # noqa: N806
            norms = [(C @ H_j * C).sum(1) for C in codebooks]  # c H_jj c
            for k in books[j]:
                # With the old word c0 taken out, R + s c0 H_jj is what the new word c meets:
                # the loss changes by -2 s c (R + s c0 H_jj) + s^2 c H_jj c, beside what does not depend on c.
                old = F.embedding(codes[:, j, k], codebooks[k])
                meets = torch.addmm(R[:, part], old * s, H_j)
                now = s.square() * F.embedding(codes[:, j, k], norms[k].unsqueeze(1)) - 2 * s * (old * meets).sum(
                    1, keepdim=True
                )
                scores = torch.addmm(norms[k].unsqueeze(1) * s.T.square(), codebooks[k], (meets * (-2 * s)).T)
                count = min(beam, M)
                least, words = _least(scores - now.T, count)  # (count, paths * out)
                total = (loss + least.view(count, paths, out)).flatten(0, 1)
                loss, chosen = ranked(total, min(beam, paths * count))
                parent = ((chosen % paths) * out + torch.arange(out, device=W.device)).flatten()
                words = words.view(count * paths, out)
                paths = loss.shape[0]
                word = words.gather(0, chosen).flatten()
                if paths > 1 or beam > 1:
                    codes, R, changes, origin, old = (t[parent] for t in (codes, R, changes, origin, old))
                    s = scales.repeat(paths).unsqueeze(1)
                codes[:, j, k] = word.int()
                change = (F.embedding(word, codebooks[k]) - old) * s
                changes[:, part] += change
                R.addmm_(change, own_H[part], alpha=-1)
        if beam > 1:
            D = D[origin]  # noqa: N806
        D.index_add_(1, columns, changes, alpha=-1)
    return codes[:out].contiguous()


def _least(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest entries of each column and their rows; for one of them, the quick way."""
    return smallest(scores, 1) if count == 1 else ranked(scores, count)
