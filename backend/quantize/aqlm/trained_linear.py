"""A Linear whose weight is a sum of codewords and whose codebooks and scales learn while its codes stay."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backend.formats.additive_weight import AdditiveWeight


class CodeIndex:
    """Codes as two look-ups: from groups to their codewords, and from codewords to the groups that use them.

    The second one turns the gradient of a codebook into sums over sorted rows, which `embedding_bag` computes about
    eight times faster on a CPU than `index_add_`, and always in the same order.

    Args:
        codes: (out, in / G, K).
        words: Words of a codebook.
    """

    def __init__(self, codes: Tensor, words: int) -> None:
        out, groups, books = codes.shape
        offsets = torch.arange(books, device=codes.device, dtype=torch.int32) * words
        self.words = (codes.int() + offsets).view(out * groups, books)  # rows of the table (K * words, G)
        flat = self.words.flatten()
        self.users = (flat.argsort(stable=True) // books).int()  # groups, in the order of the words that they use
        ends = flat.bincount(minlength=books * words).cumsum(0)
        self.begins = torch.cat([ends.new_zeros(1), ends[:-1]]).int()

    def gather(self, table: Tensor) -> Tensor:
        """Sum of the codewords of every group: (K * words, G) -> (groups, G)."""
        return F.embedding_bag(self.words, table, mode="sum")

    def scatter(self, values: Tensor) -> Tensor:
        """Sum of the values of the groups that use a codeword: (groups, G) -> (K * words, G)."""
        return F.embedding_bag(self.users, values, self.begins, mode="sum")


class _Dequantize(torch.autograd.Function):
    """W = scales * gather(codebooks), differentiable in both."""

    @staticmethod
    def forward(ctx: Any, codebooks: Tensor, scales: Tensor, index: CodeIndex) -> Tensor:
        ctx.save_for_backward(codebooks, scales)
        ctx.index = index
        return index.gather(codebooks.flatten(0, 1)).view(len(scales), -1) * scales[:, None]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        codebooks, scales = ctx.saved_tensors
        grad = grads[0]
        plain = ctx.index.gather(codebooks.flatten(0, 1)).view_as(grad)
        of_groups = (grad * scales[:, None]).view(-1, codebooks.shape[2])
        return ctx.index.scatter(of_groups).view_as(codebooks), torch.linalg.vecdot(grad, plain), None


class TrainedLinear(nn.Module):
    """y = x W^T + bias with W as in `AdditiveWeight`, for training.

    A row of W is a scale times a sum of codewords; the parameters share the row's magnitude as in the published
    program, whose scales start as the rows' norms, so that a learning rate means the same here and there.

    Args:
        weight: Where codebooks and scales start.
        bias: (out,) or None; a float32 copy of it is a parameter.
        recompute: Make W again in the backward pass instead of keeping it.
    """

    def __init__(self, weight: AdditiveWeight, bias: Tensor | None = None, *, recompute: bool = False) -> None:
        super().__init__()
        self.codes = weight.codes
        self._index = CodeIndex(weight.codes, weight.codebooks.shape[1])
        codebooks, scales = weight.codebooks.float(), weight.scales.float()
        energy = float(self._index.gather(codebooks.flatten(0, 1)).square().sum() / len(scales))  # of a row / its scale
        self._shift = 2.0 ** round(math.log2(energy) / 2) if energy > 0 else 1.0  # exact, both ways
        self.codebooks = nn.Parameter(codebooks / self._shift)  # (K, words, G)
        self.scales = nn.Parameter(scales * self._shift)  # (out,)
        self.bias = None if bias is None else nn.Parameter(bias.float().clone())
        self._recompute = recompute

    @property
    def value(self) -> AdditiveWeight:
        """The weight as it is now, float32, its magnitude shared as at the start."""
        return AdditiveWeight(self.codes, self.codebooks.detach() * self._shift, self.scales.detach() / self._shift)

    @property
    def weight(self) -> Tensor:
        """W, (out, in), float32, differentiable in codebooks and scales."""
        return _Dequantize.apply(self.codebooks, self.scales, self._index)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self._recompute and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)
