"""The metric of AQLM's search: the Gram matrix of the inputs, damped, in order of visit, with its triangular factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from backend.errors import ModelError
from backend.quantize.gptq import factorize

BLOCK = 128  # inputs of which errors reach the inputs beyond in one matrix product


@dataclass(frozen=True)
class Metric:
    """tr(D H D^T), the loss of an error D (out, in), and what error feedback and coordinate descent need of it.

    With H^-1 = U^T U, U upper triangular, the loss is the sum over groups j of ||(v_j - q_j) T_j||^2, T_j the inverse
    of the diagonal block U_jj and v_j the weights of group j after the errors of all groups before it were handed on.

    Attributes:
        H: (in, in), float32; inputs in order of visit, scaled to a mean diagonal of 1, damped.
        U: (in, in), float32, upper triangular.
        T: Inverses of U's diagonal blocks, (in/G, G, G).
        L: Lower Cholesky factors of H's diagonal blocks, (in/G, G, G).
        L_inverse: Their inverses.
        damp: What was added to H's diagonal.
        groups: Where in the weight the group of each visit lies, (in/G,).
        notes: What is worth telling about H.
    """

    H: Tensor
    U: Tensor
    T: Tensor
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
        damp: Part of the mean diagonal that is added to the diagonal; more where H stays singular.
        act_order: Visit groups in falling order of energy; else as they lie.

    Raises:
        ModelError: If H is not finite, or not positive semidefinite.
    """
    check_gram(H)
    width, notes = H.shape[0], []
    energy = H.diagonal().double()
    mean = float(energy.mean())
    if mean <= 0:
        notes.append("the inputs are all zero on the calibration text, so all weights count alike")
        H, energy, mean = torch.eye(width, device=H.device), torch.ones_like(energy), 1.0  # noqa: N806
    groups = torch.arange(width // size, device=H.device)
    if act_order:
        groups = energy.view(-1, size).sum(1).argsort(descending=True, stable=True)
    order = (groups.unsqueeze(1) * size + torch.arange(size, device=H.device)).flatten()
    H = H.index_select(0, order).index_select(1, order).float().div_(mean)  # noqa: N806
    factor = factorize(H, damp, act_order=False)
    if factor is None:
        raise ModelError("The Gram matrix of the inputs cannot be factorized; it is not positive semidefinite.")
    if factor.damp != damp:
        notes.append(f"H is singular, damping raised to {factor.damp:g}")
    H.diagonal().add_(factor.damp)
    eye = torch.eye(size, dtype=H.dtype, device=H.device)
    T = torch.linalg.solve_triangular(diagonal_blocks(factor.U, size), eye, upper=True)  # noqa: N806
    L = torch.linalg.cholesky(diagonal_blocks(H, size))  # noqa: N806
    inverse = torch.linalg.solve_triangular(L, eye, upper=False)
    return Metric(H, factor.U, T, L, inverse, factor.damp, groups, tuple(notes))


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
