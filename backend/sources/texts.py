"""Rows of text for calibration and evaluation.

One reader per kind of source: the built-in text, a local file or `save_to_disk` folder, a Hub dataset.
Every row is one string, made of the text column or of the columns put into the format string.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.demo import TEXT_FILES
from backend.errors import DataError
from backend.schema import DEMO

FILE_KINDS = (".jsonl", ".csv", ".parquet", ".txt")


@dataclass(frozen=True)
class TextSource:
    """Where rows of text come from.

    Attributes:
        name: Dataset id, or `quantdeck/demo`.
        subset: Subset of a Hub dataset.
        split: Split, e.g. `train`.
        columns: Text columns.
        template: Format string over the columns, or None for the only column as it is.
        path: Local file or folder instead of the named dataset.
    """

    name: str | None
    subset: str | None
    split: str
    columns: tuple[str, ...]
    template: str | None = None
    path: Path | None = None

    @property
    def label(self) -> str:
        """The source in one line, as protocols state it."""
        if self.path is not None:
            return f"{self.path.name}:{self.split}"
        return "/".join(filter(None, (self.name, self.subset))) + f":{self.split}"

    @property
    def is_local(self) -> bool:
        """True if it is read without the network."""
        return self.path is not None or self.name == DEMO


def read_rows(source: TextSource, cache_dir: Path | None = None) -> Iterator[str]:
    """The rows of a source as text, in order.

    Raises:
        DataError: If the file, split or a column does not exist, or the download fails.
    """
    for number, row in enumerate(_records(source, cache_dir)):
        missing = [c for c in source.columns if c not in row]
        if missing:
            raise DataError(
                f"TEXT_COLUMN: row {number + 1} of {source.label} has no column {missing[0]!r}; "
                f"it has {', '.join(map(str, row))}"
            )
        values = {c: "" if row[c] is None else str(row[c]) for c in source.columns}
        yield source.template.format(**values) if source.template else values[source.columns[0]]


def _records(source: TextSource, cache_dir: Path | None) -> Iterable[dict[str, Any]]:
    if source.path is None and source.name == DEMO:
        if source.split not in TEXT_FILES:
            raise DataError(f"SPLIT: found {source.split!r}; {DEMO} has {', '.join(TEXT_FILES)}")
        return _json_lines(TEXT_FILES[source.split])
    if source.path is None:
        return _hub(source, cache_dir)
    if source.path.is_dir():
        return _saved_folder(source.path, source.split)
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, ".txt": _plain_text}
    reader = readers.get(source.path.suffix.lower())
    if reader is None:
        raise DataError(f"DATA_PATH: found {source.path.name}; a file must be one of {', '.join(FILE_KINDS)}")
    return reader(source.path)


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: found {type(row).__name__}; each line is an object with the columns"
                )
            yield row


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except ArrowException as error:
        raise DataError(f"{path} is not a readable Parquet file: {error}") from None


def _plain_text(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield {"text": line.rstrip("\n")}


def _saved_folder(path: Path, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"DATA_PATH: {path} is not a dataset saved with save_to_disk: {error}") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"SPLIT: found {split!r}; {path} has {', '.join(map(str, data))}")
        data = data[split]
    return data


def _hub(source: TextSource, cache_dir: Path | None) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        return datasets.load_dataset(
            source.name, name=source.subset, split=source.split, cache_dir=str(cache_dir) if cache_dir else None
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"DATASET_NAME: {source.label} cannot be loaded: {reason}. Check the name, subset and split, and the "
            f"network; or use DATA_PATH, or '{DEMO}' for the built-in text"
        ) from None


def check_rows(source: TextSource, limit: int = 3) -> None:
    """Read the first rows of a local source, so that a wrong column or file is known before a job starts.

    Raises:
        DataError: If they cannot be read, or there are none.
    """
    rows = read_rows(source)
    if not [row for _, row in zip(range(limit), rows, strict=False)]:
        raise DataError(f"{source.label} has no rows; calibration needs text")
