"""Calibration text as token sequences.

Rows are read in order (or shuffled by the seed), empty rows are skipped, the rest is joined and cut into
sequences of equal length. AutoAWQ itself drops rows longer than 512 tokens and counts empty ones as samples,
so that wikitext yields far fewer tokens than asked for; here 128 x 512 means 65 536 tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence

from backend.errors import DataError

Encoder = Callable[[Sequence[str]], list[list[int]]]
"""From a batch of texts to the token ids of each, with the model's own special tokens."""


def token_sequences(
    rows: Iterable[str], encode: Encoder, *, samples: int, length: int, shuffle: bool, seed: int
) -> list[list[int]]:
    """Cut text into calibration sequences.

    Args:
        rows: Text, one string per row.
        encode: Tokenizes a batch of rows.
        samples: Sequences wanted; fewer are returned if the text ends before.
        length: Tokens per sequence.
        shuffle: Draw the rows in random order (all rows are read then).
        seed: Fixes that order.

    Returns:
        At least one sequence of exactly `length` token ids.

    Raises:
        DataError: If there is no text, or less than one sequence.
    """
    if shuffle:
        rows = list(rows)
        random.Random(seed).shuffle(rows)
    ids: list[int] = []
    found = used = 0
    batch: list[str] = []
    wanted = samples * length

    def flush() -> None:
        for tokens in encode(batch):
            ids.extend(tokens)
        batch.clear()

    for row in rows:
        found += 1
        if not row.strip():
            continue
        used += 1
        batch.append(row)
        if len(batch) == 64:
            flush()
            if len(ids) >= wanted:
                break
    if batch:
        flush()
    if not used:
        raise DataError(
            f"the calibration text has {found} rows and all are empty; choose another TEXT_COLUMN or dataset"
        )
    if len(ids) < length:
        raise DataError(
            f"the calibration text has {len(ids)} tokens in {used} rows; one sequence needs {length}. "
            "Give more text, or set a smaller CALIBRATION.SEQUENCE_LENGTH"
        )
    count = min(samples, len(ids) // length)
    return [ids[i * length : (i + 1) * length] for i in range(count)]
