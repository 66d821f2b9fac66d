"""Searching a log: the lines that contain a text, over all of its files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend.jobs.logs.files import PART_LINE, opened, whole_lines

SEARCHED_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Match:
    """A line that `find` found.

    Attributes:
        part: 0 in the newest file, 1 in the one before it, ...
        number: Its line number in that file, from 1.
        text: The line.
    """

    part: int
    number: int
    text: str


def find(path: Path, text: str, limit: int = 200, *, ignore_case: bool = True) -> list[Match]:
    """The lines that contain a text, oldest first, over all files of a log.

    Args:
        path: The newest file.
        text: what to look for, as it is (no pattern), within a line. Nothing is found for an empty text.
        limit: Number of matches at most.
        ignore_case: Whether "Error" finds "error".
    """
    found: list[Match] = []
    if not text or "\n" in text or limit < 1:
        return found
    with opened(path) as files:
        for part in files:
            number, offset = 1, 0
            while data := os.pread(part.fd, SEARCHED_AT_ONCE, offset):
                data = whole_lines(data) or data
                for line_index, line in _matches(data, text, ignore_case):
                    if offset or line_index or not PART_LINE.fullmatch(line):
                        found.append(Match(part.number, number + line_index, line))
                        if len(found) >= limit:
                            return found
                number, offset = number + data.count(b"\n"), offset + len(data)
    return found


def _matches(data: bytes, text: str, ignore_case: bool) -> Iterator[tuple[int, str]]:
    """The lines of some bytes that contain a text, with their index, from 0."""
    if text.isascii():  # most bytes are dismissed without making lines of them
        wanted, searched = (text.lower().encode(), data.lower()) if ignore_case else (text.encode(), data)
        index = start = 0
        while (at := searched.find(wanted, start)) >= 0:
            begin = searched.rfind(b"\n", 0, at) + 1
            end = searched.find(b"\n", at)
            end = len(data) if end < 0 else end
            index += searched.count(b"\n", start, begin)
            yield index, data[begin:end].decode("utf-8", "replace")
            index, start = index + 1, end + 1
        return
    folded = text.lower() if ignore_case else text
    for index, line in enumerate(data.decode("utf-8", "replace").split("\n")):
        if folded in (line.lower() if ignore_case else line):
            yield index, line
