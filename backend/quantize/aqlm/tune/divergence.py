"""KL divergence between the predictions of two models, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK_BYTES = 2**24  # of float32 logits at a time: several such arrays then fit into a processor's cache


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
    rows = max(1, CHUNK_BYTES // (4 * vocabulary))
    flat = (teacher.reshape(-1, vocabulary).split(rows), student.reshape(-1, vocabulary).split(rows))
    outs = grads.view(-1, vocabulary).split(rows) if grads is not None else [None] * len(flat[0])
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    for p_logits, q_logits, out in zip(*flat, outs, strict=True):
        log_p = p_logits.float().log_softmax(-1)
        log_q = q_logits.float().log_softmax(-1)
        p = log_p.exp()
        distance = log_q - log_p
        # sum p (e^d - 1 - d) is the KL divergence, too, but with terms that are all positive: rounding errors of
        # the logarithms enter as their squares.
        total += distance.expm1().sub_(distance).mul_(p).sum(dtype=torch.float64)
        if out is not None:
            out.copy_(log_q.exp_().sub_(p))
    return total, grads
