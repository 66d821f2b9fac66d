"""Which text may be trained on: decided by the text itself, so the splits are disjoint by construction.

A document or question belongs to a split by a hash of its content, never by where in a random stream it came
up. Two equal documents are always in the same split, whatever seed or machine made them.
"""

from __future__ import annotations

import hashlib

TEST_PERMILLE = 15
VALIDATION_PERMILLE = 8


def bucket(key: str) -> int:
    """A number from 0 to 999, fixed by `key`."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8")).digest()[:8], "big") % 1000


def split_of(text: str) -> str:
    """The split of a document: ``"train"``, ``"validation"`` or ``"test"``."""
    number = bucket(text)
    if number < TEST_PERMILLE:
        return "test"
    return "validation" if number < TEST_PERMILLE + VALIDATION_PERMILLE else "train"


def reserved(key: str, percent: int) -> bool:
    """True if the question `key` is kept for the multiple-choice test and must never be asked in any text."""
    return bucket(f"question:{key}") < 10 * percent
