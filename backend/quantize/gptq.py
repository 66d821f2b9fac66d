"""GPTQ: round one input at a time, and let the inputs still to come make up for the error.

Source: Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization" (arXiv 2210.17323). With H = X^T X, damped,
and H^-1 = U^T U, U upper triangular, rounding input j with error e moves every later input k by -e U_jk / U_jj.
Inputs are taken in blocks, so that most of the work is matrix products. Grids are fixed before the first input is
rounded ("static groups"), so any order of inputs leaves groups as they lie in the weight.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.quantize.grid import Grid

BLOCK = 128  # inputs whose errors reach the inputs beyond the block in one matrix product
SUB_BLOCK = 32  # the same inside a block; inside a sub-block errors are handed on one by one
INVERSE_BASE = 256  # triangles up to this size are inverted directly
DAMP_STEP = 10.0
MAX_DAMP = 1.0


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of H.

    Attributes:
        U: (in, in), upper triangular, U^T U = (H + damp * mean(diag H) * I)^-1 in the order of visit.
        order: Input visited at each step, (in,); None: as they are.
        damp: The damping that was needed.
    """

    U: Tensor
    order: Tensor | None
    damp: float


def factorize(H: Tensor, damp: float, act_order: bool) -> Factor | None:  # noqa: N803
    """Damp, order and factorize a Gram matrix.

    Args:
        H: (in, in), symmetric, float32 or float64.
        damp: Part of the mean diagonal that is added to the diagonal; ten times more (up to 1) while H stays singular.
        act_order: Visit the inputs in falling order of their energy, so that the errors of the largest ones can
            still be made up for.

    Returns:
        The factor, or None if H cannot be factorized even with a damping of 1 (it holds values that are not finite,
        or the inputs are all zero).
    """
    mean = float(H.diagonal().mean())
    if not 0 < mean < float("inf"):
        return None
    order = H.diagonal().argsort(descending=True, stable=True) if act_order else None
    while True:
        # H = R R^T with R upper triangular comes from the Cholesky factor of the reversed matrix; U = R^-1.
        backwards = order.flip(0) if order is not None else torch.arange(H.shape[0] - 1, -1, -1, device=H.device)
        reversed_H = H.index_select(0, backwards).gather(1, backwards.expand_as(H))  # noqa: N806
        reversed_H.diagonal().add_(damp * mean)
        L, info = torch.linalg.cholesky_ex(reversed_H)  # noqa: N806
        del reversed_H
        if int(info) == 0:
            invert_lower_(L)
            U = L.flip(0, 1)  # noqa: N806
            if bool(torch.isfinite(U.diagonal()).all()):
                return Factor(U, order, damp)
        if damp >= MAX_DAMP:
            return None
        damp = min(damp * DAMP_STEP, MAX_DAMP)


def invert_lower_(L: Tensor) -> Tensor:  # noqa: N803
    """Invert a lower triangular matrix (n, n) in place, by halves: it is a few matrix products."""
    n = L.shape[0]
    if n <= INVERSE_BASE:
        eye = torch.eye(n, dtype=L.dtype, device=L.device)
        return L.copy_(torch.linalg.solve_triangular(L, eye, upper=False))
    half = n // 2
    A, B, C = L[:half, :half], L[half:, :half], L[half:, half:]  # noqa: N806
    invert_lower_(A)
    invert_lower_(C)
    B.copy_(-(C @ (B @ A)))
    return L


def feed_back(
    w: Tensor, factor: Factor, grid: Grid, scale: Tensor, zero: Tensor, *, columns: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round a weight to given grids with error feedback.

    Args:
        w: (out, in), float32. Rows are independent: Linears that share an input may be stacked.
        factor: Of the input's Gram matrix.
        grid: The integer grids.
        scale: Steps, (out, in/group).
        zero: Zeros, likewise.
        columns: What the inputs of `w` were multiplied by, (in,), if H belongs to the unscaled ones.

    Returns:
        Codes (out, in) uint8, and the energy of each row's output error with the damped H, (out,).
    """
    out, width = w.shape
    order = torch.arange(width, device=w.device) if factor.order is None else factor.order
    W = w.T.index_select(0, order)  # (in, out): the weights of an input lie side by side  # noqa: N806
    S, Z = scale.T.contiguous(), zero.T.contiguous()  # (in/group, out)  # noqa: N806
    group = (order // (width // scale.shape[1])).tolist()
    codes = torch.empty(width, out, dtype=torch.uint8, device=w.device)
    energy = torch.zeros(out, dtype=w.dtype, device=w.device)
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        U = factor.U[start:end, start:]  # noqa: N806
        if columns is not None:
            U = U * columns[order[start:]]  # H of the scaled input is D^-1 H D^-1, so its factor is U D  # noqa: N806
        steps = U.diagonal().tolist()
        errors = torch.empty(end - start, out, dtype=w.dtype, device=w.device)
        for first in range(start, end, SUB_BLOCK):
            last = min(first + SUB_BLOCK, end)
            for j in range(first, last):
                s, z = S[group[j]], Z[group[j]]
                q = (W[j] / s).round_().add_(z).clamp_(0, grid.levels)
                codes[j] = q
                error = errors[j - start]
                torch.sub(W[j], q.sub_(z).mul_(s), out=error).div_(steps[j - start])
                if j + 1 < last:
                    W[j + 1 : last].addr_(U[j - start, j + 1 - start : last - start], error, alpha=-1)
            a, b = first - start, last - start
            if last < end:
                W[last:end].addmm_(U[a:b, b : end - start].T, errors[a:b], alpha=-1)
        if end < width:
            W[end:].addmm_(U[:, end - start :].T, errors, alpha=-1)
        energy += errors.square_().sum(0)
    return torch.empty_like(codes).index_copy_(0, order, codes).T.contiguous(), energy
