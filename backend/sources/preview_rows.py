"""The program behind a preview: reads the first rows of a text as a job would, and counts their tokens.

It runs for a few seconds, in a process of its own, so that neither a huge nor a hostile file can stop or fill the
page that asks: `python -m backend.sources.preview_rows` reads a request (JSON) from standard input and writes a
preview, or an `error`, to standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backend.errors import DataError, ModelError, QuantdeckError
from backend.process import die_with_starter
from backend.sources.calibration import token_sequences
from backend.sources.messages import (
    CalibrationRow,
    TemplateMode,
    has_chat_template,
    is_empty,
    needs_template,
    no_template_error,
    plain_text,
    written_out,
)
from backend.sources.shuffle import shuffled
from backend.sources.texts import TextSource, read_calibration_rows, stream_calibration_rows
from backend.sources.tokenizer_file import tokenizer_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_ROWS = 20_000
MOST_CHARACTERS = 16_000_000
ROW_CHARACTERS = 200_000  # of one row that are tokenized
SHOWN_CHARACTERS = 1500  # of one row that are shown
ROWS_WITHOUT_TOKENS = 256  # looked at where no tokenizer tells how many a job reads
SHORT_TOKENS = 16  # the shortest sequence that a job may have


class Bounded:
    """Rows from their start up to a limit of rows, characters and time; can be gone through more than once.

    Args:
        rows: The rows.
        until: By the monotonic clock, seconds.
    """

    def __init__(self, rows: Iterable[CalibrationRow], until: float) -> None:
        self._rows, self._until = rows, until
        self.stopped = False  # whether a limit was met

    def __iter__(self) -> Iterator[CalibrationRow]:
        characters = 0
        for number, row in enumerate(self._rows):
            if number >= MOST_ROWS or characters > MOST_CHARACTERS or time.monotonic() > self._until:
                self.stopped = True
                return
            characters += len(row if isinstance(row, str) else plain_text(row))
            yield row


class Reader:
    """Turns rows into what the model sees, and keeps the length of each and the beginning of the first ones.

    Args:
        label: The source, for errors.
        tokenizer: The model's; None if it is not on this machine.
        model_dir: The model's folder, for its chat template.
        mode: When the template writes rows.
        keep: How many rows are shown.
    """

    def __init__(
        self, label: str, tokenizer: Tokenizer | None, model_dir: Path | None, mode: TemplateMode, keep: int
    ) -> None:
        self._label, self._tokenizer, self._model_dir, self._mode = label, tokenizer, model_dir, mode
        self._keep, self._waiting = keep, list[int]()
        self._writer: Any = None  # of the chat template; False if it cannot be used
        self._special = {
            number for number, token in (tokenizer.get_added_tokens_decoder() if tokenizer else {}).items()
            if token.special
        }  # fmt: skip
        self.read = self.empty = self.beyond = 0
        self.lengths: list[int] = []
        self.shown: list[dict[str, Any]] = []
        self.notes: list[str] = []

    @property
    def counts_tokens(self) -> bool:
        """Whether lengths are in tokens."""
        return self._tokenizer is not None

    @property
    def is_templated(self) -> bool:
        """Whether the chat template has written rows."""
        return bool(self._writer)

    def count(self, rows: Iterable[CalibrationRow]) -> Iterator[CalibrationRow]:
        """The rows as they are, counted on their way to `encode`."""
        for row in rows:
            self.read += 1
            if is_empty(row):
                self.empty += 1
                self._show(self.read, [], 0, False, False)
            else:
                self._waiting.append(self.read)
            yield row

    def encode(self, rows: Sequence[CalibrationRow]) -> list[list[int]]:
        """Tokens of each row; as many as it has characters where there is no tokenizer."""
        found: list[list[int]] = []
        for row in rows:
            text, templated = self._written(row)
            cut = len(text) > ROW_CHARACTERS
            self.beyond += cut
            text = text[:ROW_CHARACTERS]
            number = self._waiting.pop(0)
            if self._tokenizer is None:
                found.append([])
                self.lengths.append(len(text))
                pieces = [(text[:SHOWN_CHARACTERS], False)]
                self._show(number, pieces, len(text), templated, len(text) > SHOWN_CHARACTERS)
                continue
            ids = self._tokenizer.encode(text, add_special_tokens=not templated).ids
            found.append(ids)
            self.lengths.append(len(ids))
            if number <= self._keep:
                pieces, shorter = self._pieces(ids)
                self._show(number, pieces, len(ids), templated, cut or shorter)
        return found

    def _written(self, row: CalibrationRow) -> tuple[str, bool]:
        """A row as text, and whether the chat template wrote it."""
        plain = row if isinstance(row, str) else plain_text(row)
        if not needs_template(row, self._mode):
            return plain, False
        if self._model_dir is None:
            return plain, False
        if not has_chat_template(self._model_dir):
            raise no_template_error(self._label)
        if self._writer is None:
            self._writer = _template_writer(self._model_dir)
            if self._writer is False:
                self.notes.append("The chat template cannot be used here, so rows are shown as what was said alone.")
        return (written_out(self._writer, row), True) if self._writer else (plain, False)

    def _pieces(self, ids: list[int]) -> tuple[list[tuple[str, bool]], bool]:
        """The beginning of a row as the tokens spell it, special ones apart, and whether more follows."""
        assert self._tokenizer is not None
        runs: list[tuple[list[int], bool]] = []
        for token in ids[:SHOWN_CHARACTERS]:
            special = token in self._special
            if runs and not special and not runs[-1][1]:
                runs[-1][0].append(token)
            else:
                runs.append(([token], special))
        pieces: list[tuple[str, bool]] = []
        left = SHOWN_CHARACTERS
        for run, special in runs:
            text = self._tokenizer.decode(run, skip_special_tokens=False)
            if left <= 0:
                return pieces, True
            pieces.append((text[:left], special))
            if len(text) > left:
                return pieces, True
            left -= len(text)
        return pieces, len(ids) > SHOWN_CHARACTERS

    def _show(self, number: int, pieces: list[tuple[str, bool]], length: int, templated: bool, cut: bool) -> None:
        if number <= self._keep:
            self.shown.append(
                {"number": number, "pieces": pieces, "length": length, "templated": templated, "cut": cut}
            )


def _template_writer(model_dir: Path) -> Any:
    """The tokenizer of transformers, which knows the template; False if it cannot be had."""
    from transformers import AutoTokenizer

    from backend.formats.config import read_config_json

    try:
        read_config_json(model_dir)  # refuses files that ask for code
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except Exception:  # the packages raise whatever a broken file makes of them
        return False


def preview_rows(request: dict[str, Any]) -> dict[str, Any]:
    """Read as many rows as a job would, within the limits.

    Args:
        request: `source` (fields of a `TextSource`), `online` (whether a Hub dataset may be fetched), `model_dir` or
            None, `cache_dir`, `samples`, `length`, `packing`, `shuffle`, `seed`, `mode`, `rows` (to show), `seconds`,
            `text` (`calibration` or `tuning`).

    Returns:
        The fields of `backend.sources.preview.Preview`.

    Raises:
        QuantdeckError: If nothing can be shown.
    """
    given = request["source"]
    path = Path(given["path"]) if given["path"] else None
    source = TextSource(**{**given, "columns": tuple(given["columns"]), "path": path})
    model_dir = Path(request["model_dir"]) if request["model_dir"] else None
    notes: list[str] = []
    tokenizer = None
    try:
        tokenizer = tokenizer_of(model_dir) if model_dir else None
    except ModelError as error:
        notes.append(error.message)
    reader = Reader(source.label, tokenizer, model_dir, request["mode"], request["rows"])
    until = time.monotonic() + request["seconds"]
    rows, bounded = _rows(source, request, until, notes)
    sequences, problem = _read(reader, rows, request)
    if not reader.read:
        late = f"no row of {source.label} could be read in {request['seconds']:.0f} s"
        raise DataError(
            late if bounded.stopped else f"{source.label} has no rows; choose another file, split or dataset"
        )
    return {
        "label": source.label,
        "unit": "tokens" if reader.counts_tokens else "characters",
        "rows": sorted(reader.shown, key=lambda row: row["number"]),
        "lengths": reader.lengths,
        "read": reader.read,
        "empty": reader.empty,
        "sequences": sequences,
        "wanted": request["samples"],
        "length": request["length"],
        "packing": request["packing"],
        "complete": not bounded.stopped,
        "warnings": _warnings(reader, request, sequences, problem, bounded.stopped),
        "notes": [*notes, *reader.notes, *_notes(reader, request, bounded.stopped)],
    }


def _rows(
    source: TextSource, request: dict[str, Any], until: float, notes: list[str]
) -> tuple[Iterable[CalibrationRow], Bounded]:
    """The rows in the job's order as far as that can be had, and what bounds them."""
    cache = Path(request["cache_dir"])
    if not source.is_local and request["online"]:
        _give_up_soon()
        if request["shuffle"]:
            notes.append("These are the first rows; the job itself draws them in random order.")
        bounded = Bounded(stream_calibration_rows(source, cache), until)
        return bounded, bounded
    rows = read_calibration_rows(source, cache)
    if not request["shuffle"]:
        bounded = Bounded(rows, until)
        return bounded, bounded
    if isinstance(rows, Sequence):  # any row can be picked
        bounded = Bounded(shuffled(rows, request["seed"]), until)
        return bounded, bounded
    bounded = Bounded(rows, until)
    return shuffled(bounded, request["seed"]), bounded


def _give_up_soon() -> None:
    """A preview tries a second time where a job would wait for minutes until the network is back."""
    from datasets import config

    config.STREAMING_READ_MAX_RETRIES = config.STREAMING_OPEN_MAX_RETRIES = 1
    config.STREAMING_READ_RETRY_INTERVAL = config.STREAMING_OPEN_RETRY_INTERVAL = 1
    config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 2


def _read(reader: Reader, rows: Iterable[CalibrationRow], request: dict[str, Any]) -> tuple[int | None, str]:
    """How many sequences the rows make (None: cannot be told), and what a job would refuse."""
    counted = reader.count(rows)
    if not reader.counts_tokens:
        for _, row in zip(range(ROWS_WITHOUT_TOKENS), counted, strict=False):
            if not is_empty(row):
                reader.encode([row])
        return None, ""
    try:
        made = token_sequences(
            counted, reader.encode, samples=request["samples"], length=request["length"], shuffle=False, seed=0,
            packing=request["packing"], text=request["text"],
        )  # fmt: skip
    except DataError as error:
        if not reader.read or reader.read == reader.empty or not reader.lengths:
            if reader.read:
                return 0, error.message
            raise
        fitting = sum(length >= request["length"] for length in reader.lengths)
        return (fitting if request["packing"] == "full" else 0), error.message
    return len(made), ""


def _warnings(reader: Reader, request: dict[str, Any], sequences: int | None, problem: str, stopped: bool) -> list[str]:
    length, found = request["length"], []
    if problem:
        found.append(problem[:1].upper() + problem[1:])
    elif sequences is not None and sequences < request["samples"]:
        more = " in the part that a preview reads" if stopped else ""
        found.append(
            f"The text makes {sequences:,} sequences of {length:,} tokens{more}; {request['samples']:,} were asked for."
        )
    if reader.empty and reader.empty < reader.read:
        found.append(f"{_rows_are(reader.empty)} empty and skipped.")
    if not reader.counts_tokens:
        return found
    if short := sum(n < SHORT_TOKENS for n in reader.lengths):
        found.append(f"{_rows_have(short)} fewer than {SHORT_TOKENS} tokens.")
    if request["packing"] == "sample" and (long := sum(n > length for n in reader.lengths)):
        found.append(f"{_rows_have(long)} more than {length:,} tokens; a job cuts them there.")
    if request["packing"] == "full" and not problem and (small := sum(n < length for n in reader.lengths)):
        found.append(f"{_rows_have(small)} fewer than {length:,} tokens and are left out.")
    return found


def _rows_are(n: int) -> str:
    return "1 row is" if n == 1 else f"{n:,} rows are"


def _rows_have(n: int) -> str:
    return "1 row has" if n == 1 else f"{n:,} rows have"


def _notes(reader: Reader, request: dict[str, Any], stopped: bool) -> list[str]:
    found = []
    if stopped:
        found.append(f"A preview reads only so much: the first {reader.read:,} rows. Numbers are of these.")
        if request["shuffle"]:
            found.append("The job itself draws rows from the whole text, so its order is another.")
    if reader.beyond:
        found.append(f"Of rows longer than {ROW_CHARACTERS:,} characters only so many were tokenized.")
    if reader.is_templated:
        found.append("Conversations are written out by the model's own chat template.")
    return found


def main() -> None:
    """Answer one request."""
    die_with_starter()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is no answer
    request = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_DATA, (request["memory"], request["memory"]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = preview_rows(request)
    except QuantdeckError as error:
        answer = {"error": error.message}
    except UnicodeDecodeError as error:
        answer = {"error": f"the text is not UTF-8 (byte {error.start})"}
    except MemoryError:
        answer = {"error": "a single row or block of this text needs more memory than a preview may use"}
    answers.write(json.dumps(answer))
    answers.close()


if __name__ == "__main__":
    main()
