"""Random order: that of datasets, the same for every kind of source, without holding a large text."""

import datasets
import pytest

from backend.sources.shuffle import FIRST_PASS, shuffled


class Lines:
    """Rows that can only be read from the start; counts how often that happens."""

    def __init__(self, n):
        self.n, self.passes = n, 0

    def __iter__(self):
        self.passes += 1
        return iter(range(self.n))


@pytest.mark.parametrize("seed", [0, 42])
@pytest.mark.parametrize("n", [1, 10, 5000])
def test_the_order_is_that_of_datasets(n, seed):
    expected = datasets.Dataset.from_dict({"i": list(range(n))}).shuffle(seed=seed)["i"]
    for rows in (list(range(n)), Lines(n), iter(range(n))):
        assert list(shuffled(rows, seed)) == list(expected)


def test_a_reader_who_stops_early_reads_the_source_twice():
    rows = Lines(100_000)
    taken = shuffled(rows, 0)
    for _ in range(FIRST_PASS):
        next(taken)
    assert rows.passes == 2  # to count, and for the first part


def test_reading_all_takes_few_passes():
    rows = Lines(100_000)
    assert sorted(shuffled(rows, 0)) == list(range(100_000))
    assert rows.passes < 10


def test_rows_with_access_by_number_are_picked():
    class Picked(list):
        def __iter__(self):
            raise AssertionError("read from the start")

    class Fetched(Picked):
        taken: list[int] = []

        def __getitem__(self, index):
            self.taken.append(index)
            return super().__getitem__(index)

    rows = Fetched(range(1000))
    first = [row for row, _ in zip(shuffled(rows, 3), range(5), strict=False)]
    assert len(set(first)) == 5
    assert len(rows.taken) <= 6


def test_nothing_to_shuffle():
    assert list(shuffled([], 0)) == []
