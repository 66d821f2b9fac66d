"""Calibration text as token sequences.

Rows are read in order (or shuffled by the seed) and empty rows are skipped. `join` lets the rest follow one another
and cuts sequences of equal length; `sample` makes every row a sequence of its own, at most that long; `full` does the
same with rows of at least that length alone, each read once, and refuses a text that has too few. AutoAWQ itself
drops rows longer than 512 tokens and counts empty ones as samples, so that wikitext yields far fewer tokens than
asked for; here 128 x 512 joined means 65 536 tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from backend.errors import DataError
from backend.sources.messages import is_empty
from backend.sources.shuffle import shuffled

Encoder = Callable[[Sequence[Any]], list[list[int]]]
"""From a batch of rows (texts, or conversations) to the token ids of each, with the model's own special tokens."""

BATCH = 64
Purpose = Literal["calibration", "tuning"]
SIZE_KEYS: dict[Purpose, tuple[str, str]] = {
    "calibration": ("CALIBRATION.SAMPLES", "CALIBRATION.SEQUENCE_LENGTH"),
    "tuning": ("llm.AQLM.FINETUNE_DATA.SAMPLES", "llm.AQLM.finetune_config.model_seqlen"),
}
"""What a text is for -> keys of the number and the length of its sequences."""


def token_sequences(
    rows: Iterable[Any],
    encode: Encoder,
    *,
    samples: int,
    length: int,
    shuffle: bool,
    seed: int,
    packing: Literal["join", "sample", "full"] = "join",
    text: Purpose = "calibration",
) -> list[list[int]]:
    """Cut text into sequences.

    Args:
        rows: One text or conversation per row.
        encode: Tokenizes a batch of rows.
        samples: Sequences wanted; fewer are returned if the text ends before.
        length: Tokens per sequence; for `sample` the most a sequence may have.
        shuffle: Draw the rows in random order.
        seed: Fixes that order.
        packing: `join`, `sample` or `full`.
        text: What it is for, for errors.

    Returns:
        At least one sequence of exactly (`sample`: at most) `length` token ids.

    Raises:
        DataError: If there is no text, or less than one sequence; `full`: if fewer than `samples` rows are so long.
    """
    samples_key, length_key = SIZE_KEYS[text]
    ids: list[int] = []
    sequences: list[list[int]] = []
    found = used = 0
    batch: list[Any] = []

    def flush() -> bool:
        """Encode what is waiting; whether there is enough now."""
        for tokens in encode(batch) if batch else ():
            if packing == "join":
                ids.extend(tokens)
            elif tokens and (packing == "sample" or len(tokens) >= length):
                sequences.append(tokens[:length])
        batch.clear()
        return (len(ids) >= samples * length) if packing == "join" else (len(sequences) >= samples)

    for row in shuffled(rows, seed) if shuffle else rows:
        found += 1
        if is_empty(row):
            continue
        used += 1
        batch.append(row)
        if len(batch) == BATCH and flush():
            break
    flush()
    if packing == "full" and used and len(sequences) < samples:
        raise DataError(
            f"{len(sequences)} of {used} rows of the {text} text have {length} tokens or more, and {samples} "
            "sequences are wanted. Set CALIBRATION.PACKING to join, which lets short rows follow one another, or a "
            f"smaller {length_key} or {samples_key}"
        )
    if not used or (packing == "sample" and not sequences):
        raise DataError(f"the {text} text has {found} rows and all are empty; choose another TEXT_COLUMN or dataset")
    if packing != "join":
        return sequences[:samples]
    if len(ids) < length:
        raise DataError(
            f"the {text} text has {len(ids)} tokens in {used} rows; one sequence needs {length}. "
            f"Give more text, or set a smaller {length_key}"
            + (", or set CALIBRATION.PACKING to sample" if text == "calibration" else "")
        )
    count = min(samples, len(ids) // length)
    return [ids[i * length : (i + 1) * length] for i in range(count)]
