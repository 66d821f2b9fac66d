"""Token sequences for calibration: exact lengths, order, seeds, and refusals with the counts."""

import pytest

from backend.errors import DataError
from backend.sources.calibration import token_sequences


def encode(texts):
    return [[int(word) for word in text.split()] for text in texts]


def rows(n):
    return [f"{i} {i}" for i in range(n)]


def cut(data, samples=4, length=8, shuffle=False, seed=0):
    return token_sequences(data, encode, samples=samples, length=length, shuffle=shuffle, seed=seed)


def test_rows_are_joined_in_order_and_cut():
    assert cut(["1 2 3", "", "4 5", "  ", "6 7 8 9 10"], samples=2, length=5) == [[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]


def test_reading_stops_when_there_is_enough():
    taken = []

    def endless():
        for i in range(10_000):
            taken.append(i)
            yield "1 2 3 4 5 6 7 8"

    assert len(cut(endless(), samples=3)) == 3
    assert len(taken) == 64


def test_fewer_sequences_if_the_text_ends():
    assert len(cut(rows(10), samples=100, length=8)) == 2


def test_a_seed_fixes_the_order():
    plain = cut(rows(500), samples=8)
    first, again, other = (cut(rows(500), samples=8, shuffle=True, seed=s) for s in (1, 1, 2))
    assert first == again != other
    assert first != plain


@pytest.mark.parametrize(
    ("data", "says"), [([], "0 rows"), (["", " \n"], "2 rows and all are empty"), (["1 2 3"], "3 tokens in 1 rows")]
)
def test_too_little_text_is_refused_with_counts(data, says):
    with pytest.raises(DataError, match=says):
        cut(data)
