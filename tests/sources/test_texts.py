"""Text from every kind of source, and refusals that name the column, split or file."""

import csv

import datasets
import pytest

from backend.errors import DataError
from backend.sources.texts import TextSource, check_rows, read_rows
from tests.conftest import write_jsonl

ROWS = [{"q": "2+2?", "a": 4}, {"q": "sky?", "a": "blue"}]


def source(path, columns=("q",), template=None, split="train"):
    return TextSource(None, None, split, columns, template, path)


def save_csv(path):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "a"])
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def save_parquet(path):
    datasets.Dataset.from_list([{"q": r["q"], "a": str(r["a"])} for r in ROWS]).to_parquet(str(path))
    return path


def save_folder(path):
    datasets.Dataset.from_list([{"q": r["q"], "a": str(r["a"])} for r in ROWS]).save_to_disk(str(path))
    return path


def save_dict(path):
    rows = [{"q": r["q"], "a": str(r["a"])} for r in ROWS]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(path))
    return path


@pytest.mark.parametrize(
    ("save", "name"),
    [
        (lambda p: write_jsonl(p, ROWS), "a.jsonl"),
        (save_csv, "a.csv"),
        (save_parquet, "a.parquet"),
        (save_folder, "folder"),
        (save_dict, "dict"),
    ],
)
def test_local_data_of_every_kind_is_read_and_formatted(tmp_path, save, name):
    path = save(tmp_path / name)
    assert list(read_rows(source(path))) == ["2+2?", "sky?"]
    formatted = read_rows(source(path, ("q", "a"), "Q: {q}\nA: {a}"))
    assert list(formatted) == ["Q: 2+2?\nA: 4", "Q: sky?\nA: blue"]


def test_plain_text_is_one_row_per_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n")
    assert list(read_rows(source(path, ("text",)))) == ["one", "two"]


def test_the_demo_text_has_its_splits():
    first = next(iter(read_rows(TextSource("quantdeck/demo", None, "test", ("text",)))))
    assert len(first) > 20
    with pytest.raises(DataError, match="SPLIT: found 'dev'.*train"):
        next(iter(read_rows(TextSource("quantdeck/demo", None, "dev", ("text",)))))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: source(write_jsonl(p / "a.jsonl", ROWS), ("text",)), "TEXT_COLUMN: row 1 .* no column .text."),
        (lambda p: source(write_jsonl(p / "a.jsonl", [])), "has no rows"),
        (lambda p: source(save_dict(p / "d"), split="test"), "SPLIT: found 'test'.*train"),
        (lambda p: source(p), "not a dataset saved"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, make, says):
    with pytest.raises(DataError, match=says):
        check_rows(make(tmp_path))


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", "{broken\n"), ("a.parquet", "PAR0"), ("a.zip", "PK")])
def test_a_broken_or_foreign_file_is_named(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=name):
        check_rows(source(path))


def test_a_hub_dataset_without_network_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="DATASET_NAME: nobody/nothing is not on this machine.*DATA_PATH"):
        list(read_rows(TextSource("nobody/nothing", None, "train", ("text",)), tmp_path))
