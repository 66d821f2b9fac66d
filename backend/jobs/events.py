"""A job's event file: JSON lines written by its stages, read by cursor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MAX_READ = 4_000_000


def read_lines(path: Path, cursor: int = 0, limit: int = MAX_READ) -> tuple[list[str], int]:
    """The complete lines after a cursor.

    Args:
        path: A growing text file; it may not exist yet.
        cursor: Byte offset of the first unread line; negative for the last `-cursor` bytes.
        limit: Bytes read at most.

    Returns:
        The lines without their ends, and the cursor for the next call. A half-written last line is left for later.
    """
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            start = max(0, size + cursor) if cursor < 0 else min(cursor, size)
            file.seek(start)
            if cursor < 0 and start > 0:
                start += len(file.readline())
            data = file.read(limit)
    except FileNotFoundError:
        return [], 0
    end = data.rfind(b"\n") + 1
    if end == 0 and len(data) == limit:
        end = len(data)  # one line longer than the limit: hand it out in pieces rather than stop
    lines = data[:end].decode("utf-8", "replace").split("\n")
    return lines[:-1] if data[:end].endswith(b"\n") else lines if end else [], start + end


def read_events(path: Path, cursor: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The events after a cursor, and the next cursor. Lines that are not JSON objects are skipped."""
    lines, cursor = read_lines(path, cursor)
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:
            continue  # a line that a killed process left torn
        if isinstance(event, dict):
            events.append(event)
    return events, cursor


def end_torn_line(path: Path) -> int:
    """Close the line that a killed writer left open, so that the next event starts on its own.

    Returns:
        The size of the file after that, 0 if there is none yet.
    """
    if not path.exists():
        return 0
    with open(path, "rb+") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                size += file.write(b"\n")
    return size
