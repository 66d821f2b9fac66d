"""Which sequences make up which step."""

from __future__ import annotations

import torch


class Batches:
    """The epochs' random orders, one after another, cut into batches: any step's batch follows from its number alone.

    Args:
        sequences: How many there are.
        batch_size: Sequences per step.
        seed: Of the orders.
    """

    def __init__(self, sequences: int, batch_size: int, seed: int) -> None:
        self._sequences, self._batch_size, self._seed = sequences, batch_size, seed
        self._orders: dict[int, list[int]] = {}

    def __getitem__(self, step: int) -> list[int]:
        """Indices of the sequences of a step, counted from 0."""
        first = step * self._batch_size
        epochs = range(first // self._sequences, (first + self._batch_size - 1) // self._sequences + 1)
        self._orders = {epoch: self._orders.get(epoch) or self._order(epoch) for epoch in epochs}
        places = range(first, first + self._batch_size)
        return [self._orders[place // self._sequences][place % self._sequences] for place in places]

    def epoch(self, step: int) -> int:
        """The epoch in which a step begins, counted from 0."""
        return step * self._batch_size // self._sequences

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        return torch.randperm(self._sequences, generator=generator).tolist()


def microbatches(batch: list[int], size: int, rank: int, processes: int) -> list[list[int]]:
    """The part of a batch that one process computes, in microbatches."""
    share = len(batch) // processes
    mine = batch[rank * share : (rank + 1) * share]
    return [mine[i : i + size] for i in range(0, share, size)]
