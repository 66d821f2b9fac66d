"""The metric of AQLM's search: the Gram matrix of the inputs, damped, in order of visit, with its triangular factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.errors import ModelError

BLOCK = 128  # inputs whose errors reach the inputs beyond in one matrix product
DAMP_STEP, MAX_DAMP = 10.0, 1.0


@dataclass(frozen=True)
class Metric:
    """tr(D H D^T), the loss of an error D (out, in), and what error feedback and coordinate descent need of it.

    With H = T T^T, T upper triangular, the loss is the sum over groups j of the squares of t_j = sum over i <= j of
    D_i T_ij. Coding the groups in order, t_j has a part that is settled, and a part D_j T_jj that the codes of group j
    can still make up for it: that is error feedback.

    Attributes:
        H: (in, in), float32; inputs in order of visit, scaled to a mean diagonal of 1, damped.
        T: T's diagonal blocks, (in/G, G, G).
        reach: Rows of T over their diagonal blocks, T_ii^-1 T_ij: what an error D_i T_ii is to group j, (in, in).
        L: Lower Cholesky factors of H's diagonal blocks, (in/G, G, G).
        L_inverse: Their inverses.
        damp: What was added to H's diagonal.
        groups: Where in the weight the group of each visit lies, (in/G,).
        notes: What is worth telling about H.
    """

    H: Tensor
    T: Tensor
    reach: Tensor
    L: Tensor
    L_inverse: Tensor
    damp: float
    groups: Tensor
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """G."""
        return self.T.shape[-1]

    def blocks(self) -> list[tuple[int, int]]:
        """First group and end of the blocks in which groups are visited."""
        count, step = len(self.T), max(1, BLOCK // self.size)
        return [(a, min(count, a + step)) for a in range(0, count, step)]

    def arrange(self, w: Tensor) -> Tensor:
        """The columns of a weight (out, in) in order of visit."""
        return w.unflatten(1, (-1, self.size)).index_select(1, self.groups).flatten(1)


def metric_of(H: Tensor, size: int, damp: float, act_order: bool) -> Metric:  # noqa: N803
    """Order, damp and factorize a Gram matrix.

    Args:
        H: (in, in), symmetric.
        size: G, inputs of a group; divides in.
        damp: Part of the mean diagonal that is added to the diagonal; ten times more (up to 1) while H stays singular.
        act_order: Visit groups in falling order of energy; else as they lie.

    Raises:
        ModelError: If H is not finite, or not positive semidefinite.
    """
    check_gram(H)
    width, notes = H.shape[0], []
    energy = H.diagonal().double()
    mean = float(energy.mean())
    if mean == 0:
        notes.append("the inputs are all zero on the calibration text, so all weights count alike")
        H, energy, mean = torch.eye(width, device=H.device), torch.ones_like(energy), 1.0  # noqa: N806
    groups = torch.arange(width // size, device=H.device)
    if act_order:
        groups = energy.view(-1, size).sum(1).argsort(descending=True, stable=True)
    order = (groups.unsqueeze(1) * size + torch.arange(size, device=H.device)).flatten()
    H = H.index_select(0, order).index_select(1, order).float().div_(mean)  # noqa: N806
    T, found = _factor(H, damp)  # noqa: N806
    if found != damp:
        notes.append(f"H is singular, damping raised to {found:g}")
    eye = torch.eye(size, device=H.device)
    own = diagonal_blocks(T, size)
    inverse = torch.linalg.solve_triangular(own, eye, upper=True)
    reach = (inverse @ T.view(-1, size, width)).view(width, width)
    L = torch.linalg.cholesky(diagonal_blocks(H, size))  # noqa: N806
    return Metric(H, own, reach, L, torch.linalg.solve_triangular(L, eye, upper=False), found, groups, tuple(notes))


def _factor(H: Tensor, damp: float) -> tuple[Tensor, float]:  # noqa: N803
    """Damp H in place; its factor T, upper triangular, H = T T^T, and the damping that was needed."""
    added = 0.0
    while True:
        H.diagonal().add_(damp - added)
        added = damp
        L, info = torch.linalg.cholesky_ex(H.flip(0, 1))  # of the reversed matrix, reversed  # noqa: N806
        if int(info) == 0 and bool(torch.isfinite(L.diagonal()).all()):
            return L.flip(0, 1), damp
        if damp >= MAX_DAMP:
            raise ModelError("The Gram matrix of the inputs cannot be factorized: it is not positive semidefinite.")
        damp = min(damp * DAMP_STEP, MAX_DAMP)


def check_gram(H: Tensor) -> None:  # noqa: N803
    """Refuse what is no Gram matrix (in, in).

    Raises:
        ModelError: If it holds values that are not finite, or a negative diagonal.
    """
    if not bool(torch.isfinite(H).all()):
        raise ModelError("The Gram matrix of the inputs holds values that are not finite.")
    if bool((H.diagonal() < 0).any()):
        raise ModelError("The Gram matrix of the inputs has a negative diagonal: it is not X^T X of any inputs.")


def diagonal_blocks(matrix: Tensor, size: int) -> Tensor:
    """Blocks (size, size) on the diagonal of a square matrix, (n / size, size, size)."""
    count = matrix.shape[0] // size
    return matrix.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()
