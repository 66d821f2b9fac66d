"""KL divergence between the predictions of two models, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = {"cpu": 2**20, "cuda": 2**28}
"""Of float32 logits at a time: on a CPU what its second cache holds, three times as fast as sixteen times that."""


@torch.no_grad()
def divergence(teacher: Tensor, student: Tensor, *, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Sum over all positions of KL(teacher || student), and its gradient by the student's logits.

    Computed some positions at a time, in float32, so that no second array of the logits' size is needed in float32.

    Args:
        teacher: Logits, (..., vocabulary).
        student: Logits, (..., vocabulary).
        gradient: Whether to compute it.

    Returns:
        The sum in nats, float64 (), and softmax(student) - softmax(teacher) in the shape and type of `student`, or
        None.
    """
    vocabulary = student.shape[-1]
    grads = torch.empty_like(student) if gradient else None
    rows = max(1, CHUNK_BYTES[student.device.type] // (4 * vocabulary))
    flat = (teacher.reshape(-1, vocabulary).split(rows), student.reshape(-1, vocabulary).split(rows))
    outs = grads.view(-1, vocabulary).split(rows) if grads is not None else [None] * len(flat[0])
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for p_logits, q_logits, out in zip(*flat, outs, strict=True):
        log_p = p_logits.float().log_softmax(-1)
        log_q = q_logits.float().log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        distance = log_q.sub_(log_p)
        difference = q.sub_(p)
        if out is not None:
            out.copy_(difference)
        # sum (q - p - p (log q - log p)) is KL(p || q), since p and q add up to one; an error in a row's logarithm
        # of the sum cancels in it.
        total += difference.sub_(distance.mul_(p)).sum(dtype=torch.float64)
    return total, grads
