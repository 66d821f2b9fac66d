"""Following a log while it is written and rotated.

A reader's place is an opaque text that names the file (inode and a checksum of its beginning, so that a new file with
an old inode is not taken for the old one) and the offset in it. It stays valid while the log is rotated and when the
reader's process is another one. All readers in a process share what was read: a file's new bytes are read once,
however many follow it.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from backend.jobs.logs.cursors import BEGINNING, File, Place, has, is_of
from backend.jobs.logs.files import FINGERPRINT, Part, body, opened, rotated, whole_lines

START_BYTES = 200_000
MAX_READ = 4_000_000
CACHED_BYTES = 1_000_000
CACHED_LOGS = 8
ANSWER_LINES = 10_000
GONE = "... lines were rotated away"


def tail(path: Path, cursor: str | None = None, *, limit: int = MAX_READ) -> tuple[list[str], str]:
    """The lines after a cursor, over all files of a log.

    Args:
        path: The newest file; it may not exist yet.
        cursor: What the last call returned; None for the last 200 kB.
        limit: Bytes returned at most; the next call goes on from there.

    Returns:
        The lines without their ends, and the cursor for the next call. A line that is being written is left for
        later. If the cursor's file was rotated away, the first line says so and the last 200 kB follow.
    """
    return _followed(path).tail(cursor, limit)


@dataclass
class _Block:
    """Whole lines of a file, in memory."""

    file: File
    start: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)


class _Followed:
    """The newest bytes of one log in memory, shared by its readers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reads = 0
        self._lock = threading.Lock()
        self._newest: tuple[int, int] | None = None  # inode and size of the newest file when it was last looked at
        self._blocks: list[_Block] = []  # without gaps, oldest first; the last one is of the newest file
        self._answers: dict[tuple[str | None, int], tuple[list[str], str]] = {}  # since the last change
        self._answer_lines = 0

    def tail(self, cursor: str | None, limit: int) -> tuple[list[str], str]:
        """See `tail`."""
        with self._lock:
            self._refresh()
            answer = self._answers.get((cursor, limit))
            if answer is None:
                answer = self._answer(cursor, limit)
                self._answer_lines += len(answer[0]) + 100
                if self._answer_lines <= ANSWER_LINES:
                    self._answers[cursor, limit] = answer
            return list(answer[0]), answer[1]

    def _refresh(self) -> None:
        """Read what is new, if anything is."""
        try:
            status = os.stat(self.path)
        except OSError:
            if self._blocks and not rotated(self.path):  # somebody deleted it; otherwise it is just being rotated
                self._blocks, self._newest = [], None
                self._forget_answers()
            return
        newest = (status.st_ino, status.st_size)
        if newest == self._newest:
            return
        self.reads += 1
        with opened(self.path, only_newest=self._newest is not None and newest[0] == self._newest[0]) as files:
            known = self._blocks[-1].file if self._blocks else None
            at = next((n for n, part in enumerate(files) if known and is_of(part, known)), None)
            if at is None:
                with opened(self.path) as every:
                    self._load(every)
            else:
                for part in files[at:]:
                    self._append(part, newest=part is files[-1])
        self._forget_answers()
        self._trim()

    def _load(self, files: list[Part]) -> None:
        """Begin anew with the end of the log."""
        self._blocks = []
        first, n_bytes = len(files), 0
        while first > 0 and n_bytes < START_BYTES:
            first -= 1
            n_bytes += files[first].size
        for part in files[first:]:
            start = _line_start(part, n_bytes - START_BYTES) if part is files[first] and n_bytes > START_BYTES else 0
            self._blocks.append(_Block(File(part.inode, b"", start), start, b""))
            self._append(part, newest=part is files[-1])

    def _append(self, part: Part, *, newest: bool) -> None:
        """Take the new lines of a file over; it is the last block's, or the one after it."""
        if not self._blocks or self._blocks[-1].file.inode != part.inode:
            self._blocks.append(_Block(File(part.inode, b"", 0), 0, b""))
        block = self._blocks[-1]
        file = block.file
        size = os.fstat(part.fd).st_size
        if size - file.end > CACHED_BYTES:
            start = _line_start(part, size - CACHED_BYTES)
            block = _Block(file, start, b"")
            self._blocks = [block]
            file.end = start
        data = whole_lines(_read(part.fd, file.end, size - file.end), last=not newest)
        file.look_at(part)  # only now: it must know as much of the beginning as cursors into these lines say
        if len(block.data) > CACHED_BYTES // 8:
            block = _Block(file, file.end, b"")
            self._blocks.append(block)
        block.data += data
        file.end += len(data)
        if newest:
            self._newest = (part.inode, size)

    def _trim(self) -> None:
        total = sum(len(block.data) for block in self._blocks)
        while len(self._blocks) > 1 and total - len(self._blocks[0].data) >= CACHED_BYTES // 2:
            total -= len(self._blocks.pop(0).data)

    def _forget_answers(self) -> None:
        self._answers = {}
        self._answer_lines = 0

    def _answer(self, cursor: str | None, limit: int) -> tuple[list[str], str]:
        if not self._blocks:
            return [], cursor or BEGINNING
        if cursor is None:
            return self._ending(limit)
        if cursor == BEGINNING:
            return self._from_disk(None, limit) or self._ending(limit)
        place = Place.of(cursor)
        if place is not None:
            for index, block in enumerate(self._blocks):
                if block.file.holds(place) and block.start <= place.offset <= block.end:
                    return self._from_memory(index, place.offset, limit)
            answer = self._from_disk(place, limit)
            if answer is not None:
                return answer
        lines, cursor = self._ending(limit)
        return [GONE, *lines], cursor

    def _ending(self, limit: int) -> tuple[list[str], str]:
        """The end of the log, from the beginning of a line."""
        wanted = min(START_BYTES, limit)
        index = len(self._blocks) - 1
        while index > 0 and wanted > len(self._blocks[index].data):
            wanted -= len(self._blocks[index].data)
            index -= 1
        block = self._blocks[index]
        skip = max(0, len(block.data) - wanted)
        if skip:
            skip = block.data.find(b"\n", skip - 1) + 1
        return self._from_memory(index, block.start + skip, limit)

    def _from_memory(self, index: int, offset: int, limit: int) -> tuple[list[str], str]:
        lines: list[str] = []
        block = self._blocks[index]
        while True:
            data = block.data[offset - block.start : offset - block.start + limit]
            if len(data) == limit:
                data = whole_lines(data) or data
            lines += _lines(data, offset)
            offset, limit = offset + len(data), limit - len(data)
            if offset < block.end or limit <= 0 or index == len(self._blocks) - 1:
                return lines, block.file.cursor(offset)
            index += 1
            block = self._blocks[index]
            offset = block.start

    def _from_disk(self, place: Place | None, limit: int) -> tuple[list[str], str] | None:
        """Lines that are in memory no more; None if they are not on disk either."""
        with opened(self.path) as files:
            at, offset = 0, 0
            if place is not None:
                found = next((n for n, part in enumerate(files) if has(part, place)), None)
                if found is None:
                    return None
                at, offset = found, place.offset
            lines: list[str] = []
            for index in range(at, len(files)):
                part, newest = files[index], index == len(files) - 1
                size = os.fstat(part.fd).st_size
                data = _read(part.fd, offset, min(limit, size - offset))
                data = (whole_lines(data) or data) if len(data) == limit else whole_lines(data, last=not newest)
                lines += _lines(data, offset)
                offset, limit = offset + len(data), limit - len(data)
                if newest or offset < size or limit <= 0:
                    file = File(part.inode, os.pread(part.fd, FINGERPRINT, 0), offset)
                    return lines, file.cursor(offset)
                offset = 0
        return None


def _line_start(part: Part, offset: int) -> int:
    """The beginning of the first line that begins at an offset or after it."""
    if offset <= 0:
        return 0
    found = os.pread(part.fd, 1 << 20, offset - 1).find(b"\n")
    return offset + found if found >= 0 else offset


def _read(fd: int, offset: int, n_bytes: int) -> bytes:
    pieces = []
    while n_bytes > 0 and (data := os.pread(fd, n_bytes, offset)):
        pieces.append(data)
        offset, n_bytes = offset + len(data), n_bytes - len(data)
    return b"".join(pieces)


def _lines(data: bytes, offset: int) -> list[str]:
    """The lines of bytes that lie at an offset of a file, without the one on which part of the log it is."""
    if offset == 0:
        data = body(data)
    lines = data.decode("utf-8", "replace").split("\n")
    return lines if lines[-1] else lines[:-1]


_logs: OrderedDict[Path, _Followed] = OrderedDict()
_logs_lock = threading.Lock()


def _followed(path: Path) -> _Followed:
    with _logs_lock:
        followed = _logs.pop(path, None) or _Followed(path)
        _logs[path] = followed
        while len(_logs) > CACHED_LOGS:
            _logs.popitem(last=False)
        return followed
