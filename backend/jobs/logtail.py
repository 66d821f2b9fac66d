"""Reading a log while it is written and rotated: following it, searching it, all of it.

A reader's place is an opaque text that names the file (inode and a checksum of its beginning, so that a new file with
an old inode is not taken for the old one) and the offset in it. It stays valid while the log is rotated and when the
reader's process is another one. All readers in a process share what was read: a file's new bytes are read once,
however many follow it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend.jobs.logs import PART_LINE, numbered, rotated

START_BYTES = 200_000
MAX_READ = 4_000_000
CACHED_BYTES = 1_000_000
CACHED_LOGS = 8
ANSWER_LINES = 10_000
GONE = "... lines were rotated away"
_FINGERPRINT = 128
_SEARCHED_AT_ONCE = 1 << 20
_CURSOR_LENGTH = 60
_BEGINNING = "0-0-0"  # cursor of a log that does not exist yet


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


def parts(path: Path) -> list[Path]:
    """The files of a log that exist, oldest first."""
    files = [numbered(path, number) for number in reversed(rotated(path))] + [path]
    return [file for file in files if file.is_file()]


def size(path: Path) -> int:
    """Bytes of all files of a log."""
    total = 0
    for file in parts(path):
        with contextlib.suppress(OSError):
            total += file.stat().st_size
    return total


def read_all(path: Path, *, chunk: int = 1 << 16) -> Iterator[bytes]:
    """The whole log, oldest first, in pieces; for a download. It ends where the log ended when it began."""
    with contextlib.ExitStack() as stack:
        opened = _open_all(path)
        files = [stack.enter_context(open(part.fd, "rb")) for part in opened]
        for index, (part, file) in enumerate(zip(opened, files, strict=True)):
            left = part.size
            if index:
                data = file.read(min(_FINGERPRINT, left))
                left -= len(data)
                yield _body(data)
            while left > 0 and (data := file.read(min(chunk, left))):
                left -= len(data)
                yield data


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
    with _opened(path) as files:
        for part in files:
            number, offset = 1, 0
            while data := os.pread(part.fd, _SEARCHED_AT_ONCE, offset):
                data = _whole_lines(data) or data
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


@dataclass
class _Part:
    """An open file of a log."""

    fd: int
    number: int
    inode: int
    size: int


def _open_all(path: Path, *, only_newest: bool = False) -> list[_Part]:
    """The files of a log, oldest first, each once although they may be renamed meanwhile.

    They are opened newest first: a file only ever moves to a higher number, so none that exists can be missed. If the
    log is rotated meanwhile, it is done again: of two rotations the first one's new file would be out of its order.
    """
    for _ in range(10):
        found = _open_once(path, only_newest=only_newest)
        if only_newest or not found or _inode(path) in (found[-1].inode, None):
            break
        for part in found:
            os.close(part.fd)
    else:
        return _open_once(path, only_newest=only_newest)
    return found


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:  # just being rotated
        return None


def _open_once(path: Path, *, only_newest: bool) -> list[_Part]:
    found: dict[int, _Part] = {}
    number, last = 0, 0 if only_newest else max(rotated(path), default=0)
    while number <= last:
        try:
            fd = os.open(numbered(path, number), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            pass
        else:
            status = os.fstat(fd)
            if status.st_ino in found:
                os.close(fd)
            else:
                found[status.st_ino] = _Part(fd, number, status.st_ino, status.st_size)
        number += 1
        if number > last and not only_newest:
            last = max(rotated(path), default=0)
    return list(reversed(found.values()))


def _body(data: bytes) -> bytes:
    """The beginning of a file without its line on which part of the log it is."""
    first, newline, rest = data.partition(b"\n")
    return rest if newline and PART_LINE.fullmatch(first.decode("utf-8", "replace")) else data


@dataclass
class _File:
    """One file of a followed log, as far as it is known.

    Attributes:
        head: Its first bytes, which tell it from others.
        end: Offset up to which whole lines were read.
    """

    inode: int
    head: bytes
    end: int

    def cursor(self, offset: int) -> str:
        """The cursor of a place in it."""
        return f"{self.inode:x}-{offset:x}-{_checksum(self.head, offset):x}"

    def holds(self, place: _Place) -> bool:
        """Whether a place is one of this file, among what was read of it."""
        return (
            self.inode == place.inode
            and place.offset <= self.end
            and _checksum(self.head, place.offset) == place.checksum
        )

    def look_at(self, part: _Part) -> None:
        """Read its beginning, unless that is known."""
        if len(self.head) < _FINGERPRINT:
            self.head = os.pread(part.fd, _FINGERPRINT, 0)


@dataclass(frozen=True)
class _Place:
    """A cursor's content."""

    inode: int
    offset: int
    checksum: int

    @classmethod
    def of(cls, cursor: str) -> _Place | None:
        """The place that a cursor names; None if it is no cursor. Cursors come from browsers: they may be anything."""
        if len(cursor) > _CURSOR_LENGTH:
            return None
        try:
            inode, offset, checksum = (int(field, 16) for field in cursor.split("-"))
        except ValueError:
            return None
        return cls(inode, offset, checksum) if offset >= 0 else None


@dataclass
class _Block:
    """Whole lines of a file, in memory."""

    file: _File
    start: int
    data: bytes

    @property
    def end(self) -> int:
        return self.start + len(self.data)


def _checksum(head: bytes, offset: int) -> int:
    return zlib.crc32(head[: min(offset, _FINGERPRINT)])


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
        with _opened(self.path, only_newest=self._newest is not None and newest[0] == self._newest[0]) as files:
            known = self._blocks[-1].file if self._blocks else None
            at = next((n for n, part in enumerate(files) if known and _is_of(part, known)), None)
            if at is None:
                with _opened(self.path) as every:
                    self._load(every)
            else:
                for part in files[at:]:
                    self._append(part, newest=part is files[-1])
        self._forget_answers()
        self._trim()

    def _load(self, files: list[_Part]) -> None:
        """Begin anew with the end of the log."""
        self._blocks = []
        first, n_bytes = len(files), 0
        while first > 0 and n_bytes < START_BYTES:
            first -= 1
            n_bytes += files[first].size
        for part in files[first:]:
            start = _line_start(part, n_bytes - START_BYTES) if part is files[first] and n_bytes > START_BYTES else 0
            self._blocks.append(_Block(_File(part.inode, b"", start), start, b""))
            self._append(part, newest=part is files[-1])

    def _append(self, part: _Part, *, newest: bool) -> None:
        """Take the new lines of a file over; it is the last block's, or the one after it."""
        if not self._blocks or self._blocks[-1].file.inode != part.inode:
            self._blocks.append(_Block(_File(part.inode, b"", 0), 0, b""))
        block = self._blocks[-1]
        file = block.file
        size = os.fstat(part.fd).st_size
        if size - file.end > CACHED_BYTES:
            start = _line_start(part, size - CACHED_BYTES)
            block = _Block(file, start, b"")
            self._blocks = [block]
            file.end = start
        data = _whole_lines(_read(part.fd, file.end, size - file.end), last=not newest)
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
            return [], cursor or _BEGINNING
        if cursor is None:
            return self._ending(limit)
        if cursor == _BEGINNING:
            return self._from_disk(None, limit) or self._ending(limit)
        place = _Place.of(cursor)
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
                data = _whole_lines(data) or data
            lines += _lines(data, offset)
            offset, limit = offset + len(data), limit - len(data)
            if offset < block.end or limit <= 0 or index == len(self._blocks) - 1:
                return lines, block.file.cursor(offset)
            index += 1
            block = self._blocks[index]
            offset = block.start

    def _from_disk(self, place: _Place | None, limit: int) -> tuple[list[str], str] | None:
        """Lines that are in memory no more; None if they are not on disk either."""
        with _opened(self.path) as files:
            at, offset = 0, 0
            if place is not None:
                found = next((n for n, part in enumerate(files) if _has(part, place)), None)
                if found is None:
                    return None
                at, offset = found, place.offset
            lines: list[str] = []
            for index in range(at, len(files)):
                part, newest = files[index], index == len(files) - 1
                size = os.fstat(part.fd).st_size
                data = _read(part.fd, offset, min(limit, size - offset))
                data = (_whole_lines(data) or data) if len(data) == limit else _whole_lines(data, last=not newest)
                lines += _lines(data, offset)
                offset, limit = offset + len(data), limit - len(data)
                if newest or offset < size or limit <= 0:
                    file = _File(part.inode, os.pread(part.fd, _FINGERPRINT, 0), offset)
                    return lines, file.cursor(offset)
                offset = 0
        return None


@contextlib.contextmanager
def _opened(path: Path, *, only_newest: bool = False) -> Iterator[list[_Part]]:
    files = _open_all(path, only_newest=only_newest)
    try:
        yield files
    finally:
        for part in files:
            os.close(part.fd)


def _is_of(part: _Part, file: _File) -> bool:
    """Whether an open file is one that was read before, grown or not."""
    head = os.pread(part.fd, _FINGERPRINT, 0)
    return part.inode == file.inode and part.size >= file.end and head[: len(file.head)] == file.head


def _has(part: _Part, place: _Place) -> bool:
    if part.inode != place.inode or part.size < place.offset:
        return False
    return _checksum(os.pread(part.fd, _FINGERPRINT, 0), place.offset) == place.checksum


def _line_start(part: _Part, offset: int) -> int:
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


def _whole_lines(data: bytes, *, last: bool = False) -> bytes:
    """Bytes up to the end of the last whole line; all of them if no more will come."""
    return data if last else data[: data.rfind(b"\n") + 1]


def _lines(data: bytes, offset: int) -> list[str]:
    """The lines of bytes that lie at an offset of a file, without the one on which part of the log it is."""
    if offset == 0:
        data = _body(data)
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
