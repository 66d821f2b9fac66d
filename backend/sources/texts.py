"""Rows of text for calibration and evaluation.

One reader per kind of source: the built-in text, a local file or `save_to_disk` folder, a Hub dataset.
Every row is one string, made of the text column or of the columns put into the format string.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.demo import TEXT_FILES
from backend.errors import DataError
from backend.schema import DEMO
from backend.sources.hub_errors import dataset_error
from backend.sources.messages import CalibrationRow, is_messages, plain_text

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


def read_rows(source: TextSource, cache_dir: Path | None = None) -> Iterable[str]:
    """The rows of a source as text, in order; of conversations, what was said.

    The rows can be gone through more than once; each time the source is read from its start.

    Raises:
        DataError: While they are read, if the file, split or a column does not exist, or the download fails.
    """
    return _Read(source, cache_dir, _as_text)


def read_calibration_rows(source: TextSource, cache_dir: Path | None = None) -> Iterable[CalibrationRow]:
    """As `read_rows`, but a conversation stays a list of messages, for a chat template to write out.

    A dataset from the Hub or a saved folder gives a sequence, so that rows can be picked without reading all.
    """
    records = _records(source, cache_dir)
    if isinstance(records, Iterator):
        return _Read(source, cache_dir, _as_row)
    return _Picked(source, records)


def stream_calibration_rows(source: TextSource, cache_dir: Path | None = None) -> Iterator[CalibrationRow]:
    """The rows of a Hub dataset from its start, fetched as they are asked for; the dataset is not kept.

    Raises:
        DataError: As for `read_rows`.
    """
    for number, record in enumerate(_hub(source, cache_dir, stream=True)):
        yield _as_row(source, number, record)


def _as_row(source: TextSource, number: int, record: dict[str, Any]) -> CalibrationRow:
    missing = [c for c in source.columns if c not in record]
    if missing:
        raise DataError(
            f"TEXT_COLUMN: row {number + 1} of {source.label} has no column {missing[0]!r}; "
            f"it has {', '.join(map(str, record))}; choose among these"
        )
    if not source.template and is_messages(record[source.columns[0]]):
        return record[source.columns[0]]
    values = {c: _text(record[c]) for c in source.columns}
    return source.template.format(**values) if source.template else values[source.columns[0]]


def _as_text(source: TextSource, number: int, record: dict[str, Any]) -> str:
    row = _as_row(source, number, record)
    return row if isinstance(row, str) else plain_text(row)


def _text(value: Any) -> str:
    if is_messages(value):
        return plain_text(value)
    return "" if value is None else str(value)


class _Read(Iterable[Any]):
    """Rows that are read from the start whenever somebody goes through them."""

    def __init__(self, source: TextSource, cache_dir: Path | None, convert: Any) -> None:
        self._source, self._cache_dir, self._convert = source, cache_dir, convert

    def __iter__(self) -> Iterator[Any]:
        for number, record in enumerate(_records(self._source, self._cache_dir)):
            yield self._convert(self._source, number, record)


class _Picked(Sequence[Any]):
    """Rows of a dataset with random access."""

    def __init__(self, source: TextSource, records: Any) -> None:
        self._source, self._records = source, records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> Any:
        return _as_row(self._source, index, self._records[index])

    def __iter__(self) -> Iterator[Any]:
        for number, record in enumerate(self._records):
            yield _as_row(self._source, number, record)


def _records(source: TextSource, cache_dir: Path | None) -> Iterable[dict[str, Any]]:
    if source.path is None and source.name == DEMO:
        if source.split not in TEXT_FILES:
            raise DataError(f"SPLIT: found {source.split!r}; {DEMO} has {', '.join(TEXT_FILES)}; choose one")
        return _json_lines(TEXT_FILES[source.split])
    if source.path is None:
        return _hub(source, cache_dir)
    if source.path.is_dir():
        return _saved_folder(source.path, source.split)
    readers = {".jsonl": _json_lines, ".csv": _csv, ".parquet": _parquet, ".txt": _plain_text}
    reader = readers.get(source.path.suffix.lower())
    if reader is None:
        raise DataError(f"DATA_PATH: found {source.path.name}; a file must be one of {', '.join(FILE_KINDS)}")
    if not source.path.is_file():
        raise DataError(
            f"DATA_PATH: {source.path} is not a regular file; give {', '.join(FILE_KINDS)}, or a saved folder"
        )
    return _readable(reader(source.path), source.path)


def _readable(rows: Iterator[dict[str, Any]], path: Path) -> Iterator[dict[str, Any]]:
    """The rows, with what goes wrong in a file said in words."""
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (csv.Error, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}; check the file and its rights, or give another") from None


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{path}, line {number}: not JSON ({error}); write one JSON object per line") from None
            if not isinstance(row, dict):
                raise DataError(
                    f"{path}, line {number}: found {type(row).__name__}; make each line an object with the columns"
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
        raise DataError(f"{path} is not a readable Parquet file: {error}; write or get it again") from None


def _plain_text(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as file:
        for line in file:
            yield {"text": line.rstrip("\n")}


def _saved_folder(path: Path, split: str) -> Iterable[dict[str, Any]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(
            f"DATA_PATH: {path} is not a dataset saved with save_to_disk ({error}); give its folder, or a file"
        ) from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise DataError(f"SPLIT: found {split!r}; {path} has {', '.join(map(str, data))}; choose one")
        data = data[split]
    return data


def _hub(source: TextSource, cache_dir: Path | None, *, stream: bool = False) -> Iterable[dict[str, Any]]:
    import datasets
    import httpx

    cache = str(cache_dir) if cache_dir else None
    try:
        if not stream:
            return datasets.load_dataset(source.name, name=source.subset, split=source.split, cache_dir=cache)
        data = datasets.load_dataset(
            source.name, name=source.subset, split=source.split, cache_dir=cache, streaming=True
        )
        return _reached(source, data)
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise _not_loaded(source, error) from None


def _reached(source: TextSource, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows that come over the network one by one, with what goes wrong on the way said in words."""
    import httpx

    try:
        yield from rows
    except (OSError, ValueError, RuntimeError, httpx.HTTPError) as error:
        raise _not_loaded(source, error) from None


def _not_loaded(source: TextSource, error: Exception) -> DataError:
    if (told := dataset_error(error, str(source.name))) is not None:
        return told
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DataError(
        f"DATASET_NAME: {source.label} cannot be loaded: {reason}. Check the name, subset and split, and the "
        f"network; or use DATA_PATH, or '{DEMO}' for the built-in text"
    )


def check_rows(source: TextSource, limit: int = 3) -> None:
    """Read the first rows of a local source, so that a wrong column or file is known before a job starts.

    Raises:
        DataError: If they cannot be read, or there are none.
    """
    rows = read_rows(source)
    if not [row for _, row in zip(range(limit), rows, strict=False)]:
        raise DataError(
            f"{source.label} has no rows, and calibration needs text; choose another file, split or dataset"
        )
