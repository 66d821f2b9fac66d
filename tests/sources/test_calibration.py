"""Token sequences for calibration: exact lengths, order, seeds, and refusals with the counts."""

import pytest

from backend.errors import DataError
from backend.schema import CalibrationSettings
from backend.sources.calibration import token_sequences


def encode(texts):
    return [[int(word) for word in text.split()] for text in texts]


def rows(n):
    return [f"{i} {i}" for i in range(n)]


def cut(data, samples=4, length=8, shuffle=False, seed=0, packing="join"):
    return token_sequences(data, encode, samples=samples, length=length, shuffle=shuffle, seed=seed, packing=packing)


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


def test_sample_keeps_rows_apart_and_cuts_each():
    data = ["1 2 3", "", "4 5", "6 7 8 9 10 11"]
    assert cut(data, samples=8, length=4, packing="sample") == [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
    assert cut(data, samples=2, length=4, packing="sample") == [[1, 2, 3], [4, 5]]


def test_sample_takes_as_many_rows_as_asked_for_and_reads_no_further():
    taken = []

    def endless():
        for i in range(10_000):
            taken.append(i)
            yield f"{i}"

    assert cut(endless(), samples=70, packing="sample") == [[i] for i in range(70)]
    assert len(taken) == 128


def test_sample_shuffles_as_datasets_does():
    import datasets

    data = datasets.Dataset.from_dict({"text": [str(i) for i in range(200)]})
    expected = data.shuffle(seed=42).select(range(16))["text"]
    rows_ = [str(i) for i in range(200)]
    assert cut(rows_, samples=16, shuffle=True, seed=42, packing="sample") == [[int(t)] for t in expected]


def test_sample_without_text_is_refused():
    with pytest.raises(DataError, match="2 rows and all are empty"):
        cut(["", " "], packing="sample")


@pytest.mark.parametrize(("written", "read"), [(True, "on"), (False, "off"), ("on", "on"), ("auto", "auto")])
def test_a_bare_on_or_off_in_the_file_is_understood(written, read):
    assert read == CalibrationSettings.model_validate({"CHAT_TEMPLATE": written}).CHAT_TEMPLATE


def test_full_takes_long_rows_alone_reads_each_once_and_says_how_many_there_are():
    data = ["1 2 3", "4 5 6 7 8", "", "9 10 11 12", "13 14 15"]
    assert cut(data, samples=2, length=4, packing="full") == [[4, 5, 6, 7], [9, 10, 11, 12]]
    read = []

    def once():
        for row in data:
            read.append(row)
            yield row

    with pytest.raises(DataError, match="2 of 4 rows .* have 4 tokens or more, and 3 sequences are wanted") as caught:
        cut(once(), samples=3, length=4, packing="full")
    assert "PACKING to join" in caught.value.message and read == data
    with pytest.raises(DataError, match="all are empty"):
        cut(["", " "], packing="full")
