"""Rows in random order without holding a large text.

The order is that of `datasets.Dataset.shuffle(seed)`: the permutation that numpy's default generator gives for the
number of rows. So the same seed draws the same rows whether a dataset is read from the Hub or from a file of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

Row = TypeVar("Row")

FIRST_PASS = 1024


def shuffled(rows: Iterable[Row], seed: int) -> Iterator[Row]:
    """Draw every row once, in an order fixed by the seed.

    Rows with random access are picked one by one. Others are read from the start several times: once to count
    them, then once for each growing part of the order, so that a reader who stops early never has more than about
    twice the rows it took in memory. Only a one-time iterator has to be kept whole.
    """
    import numpy

    if isinstance(rows, Iterator):
        rows = list(rows)
    count = len(rows) if isinstance(rows, Sequence) else sum(1 for _ in rows)
    order = [int(index) for index in numpy.random.default_rng(seed).permutation(count)]
    if isinstance(rows, Sequence):
        yield from (rows[index] for index in order)
        return
    begin, size = 0, FIRST_PASS
    while begin < count:
        part = order[begin : begin + size]
        wanted = set(part)
        found = {index: row for index, row in enumerate(rows) if index in wanted}
        yield from (found[index] for index in part)
        begin, size = begin + size, size * 2
