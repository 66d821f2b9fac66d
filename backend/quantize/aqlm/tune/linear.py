"""One quantized Linear while it is tuned: codes, codebooks, scales, and the buffer from which new codes come."""

from __future__ import annotations

import torch
from torch import Tensor

from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.trained_linear import CodeIndex
from backend.quantize.aqlm.tune.codes import largest, nearest_codes, within_trust
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.settings import TuneSettings


class TunedLinear:
    """The rows of an additive weight that this process holds.

    Args:
        weight: The whole of it.
        group: The processes that share its rows.
        device: Where to keep them.

    Attributes:
        codes: int32, (rows, in / G, K).
        codebooks: float32, (K, M, G); the same in all processes.
        scales: float32, (rows,).
        buffer: The straight-through copy of the weight, (rows, in); None while codes stay.
    """

    def __init__(self, weight: AdditiveWeight, group: Group, device: torch.device) -> None:
        self._group, self._out = group, weight.shape[0]
        begin, end = group.rows(self._out)
        self.codes = weight.codes[begin:end].to(device, copy=True)
        self.codebooks = weight.codebooks.to(device, torch.float32, copy=True)
        self.scales = weight.scales[begin:end].to(device, torch.float32, copy=True)
        self.buffer: Tensor | None = None
        self._begin, self._index = begin, CodeIndex(self.codes, self.codebooks.shape[1])

    @property
    def total_groups(self) -> int:
        """Groups of all rows."""
        return self._out * self.codes.shape[1]

    def weight(self) -> Tensor:
        """The rows as they are now, float32 (rows, in)."""
        return self._plain().mul_(self.scales[:, None])

    def whole(self) -> AdditiveWeight:
        """All rows, on the CPU."""
        codes = self._group.gather_rows(self.codes, self._out).cpu()
        scales = self._group.gather_rows(self.scales, self._out).cpu()
        return AdditiveWeight(codes, self.codebooks.cpu(), scales)

    def set_codes(self, codes: Tensor) -> None:
        """Replace the codes of the rows."""
        self.codes = codes
        self._index = CodeIndex(codes, self.codebooks.shape[1])

    def gradients(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of codebooks (K, M, G) and scales (rows,) from that of the weight.

        dL/dC_k[m] is the sum of s_o dL/dW over the groups whose code is m; groups are visited codeword by codeword, so
        that sums are always taken in the same order.

        Args:
            grad: dL/dW of the rows, float32 (rows, in).
        """
        books, words, width = self.codebooks.shape
        if not len(grad):
            of_words = torch.zeros_like(self.codebooks)
        else:
            of_words = self._index.scatter((grad * self.scales[:, None]).view(-1, width)).view(books, words, width)
        return self._group.sum(of_words), torch.linalg.vecdot(grad, self._plain())

    def change_codes(self, settings: TuneSettings, number: int) -> int:
        """The V step: bring the groups that are farthest from the buffer nearer to it.

        Args:
            settings: How many groups, and how far.
            number: Of this step.

        Returns:
            Groups, of all processes, whose codes have changed.
        """
        assert self.buffer is not None
        groups, books = self.codes.shape[1:]
        width = self.codebooks.shape[2]
        weight = self.weight().view(-1, groups, width)
        wished = self.buffer.to(torch.float32).view(-1, groups, width)
        changes = self._group.gather_rows((wished - weight).square().sum(-1), self._out)
        chosen = largest(changes, settings.max_code_change_per_step)  # in all rows
        here = (chosen >= self._begin * groups) & (chosen < (self._begin + len(self.codes)) * groups)
        mine = chosen[here] - self._begin * groups
        scale = self.scales[mine // groups, None]
        targets = wished.view(-1, width)[mine] / torch.where(scale == 0, 1.0, scale)
        before = self.codes.view(-1, books)[mine]
        after = nearest_codes(
            targets, before, self.codebooks, beam=settings.beam_size, first=number % books,
            force=settings.force_code_update,
        )  # fmt: skip
        kept = self._trusted(weight, scale * (self._sum(after) - self._sum(before)), here, settings.code_trust_ratio)
        changed = kept & (after != before).any(1)
        total = int(self._group.sum(changed.sum()))
        if total:
            codes = self.codes.view(-1, books).clone()
            codes[mine[changed]] = after[changed]
            self.set_codes(codes.view_as(self.codes))
        return total

    def _trusted(self, weight: Tensor, moves: Tensor, here: Tensor, ratio: float | None) -> Tensor:
        """Which of this process's changes to make, so that the whole weight changes no more than it may."""
        if ratio is None:
            return torch.ones(len(moves), dtype=torch.bool, device=moves.device)
        squares = torch.zeros(len(here) + 1, dtype=torch.float64, device=moves.device)
        squares[:-1][here] = moves.double().square().sum(-1)
        squares[-1] = weight.square().sum(dtype=torch.float64)
        self._group.sum(squares)
        return within_trust(squares[:-1], ratio * float(squares[-1]) ** 0.5)[here]

    def _sum(self, codes: Tensor) -> Tensor:
        """Sums of codewords, (n, G), of codes (n, K)."""
        books = torch.arange(codes.shape[1], device=codes.device)
        return self.codebooks[books, codes.long()].sum(1)

    def _plain(self) -> Tensor:
        """The rows without their scales, (rows, in)."""
        width = self.codes.shape[1] * self.codebooks.shape[2]
        if not len(self.codes):
            return self.codebooks.new_zeros((0, width))
        return self._index.gather(self.codebooks.flatten(0, 1)).view(-1, width)
