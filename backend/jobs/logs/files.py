"""The files of a log on disk: `log.log` is the newest, `log.log.1` the one before it, and so on.

They are opened without following links: a log is shown to whoever may open the page, and a link in its place would
show them another file.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PART_LINE = re.compile(r"\.\.\. \[part (\d+) of the log, begun \S+\]")
"""First line of every file of a log but the first: no two files begin alike, so no reader takes one for another."""

FINGERPRINT = 128
"""So many first bytes of a file are read to tell it from others."""


def numbered(path: Path, number: int) -> Path:
    """The file of a log that was rotated away so many times; 0 is the newest."""
    return path.with_name(f"{path.name}.{number}") if number else path


def rotated(path: Path) -> list[int]:
    """The numbers of the files of a log besides the newest, in ascending order."""
    found = []
    try:
        names: Any = os.listdir(path.parent)
    except OSError:
        return []
    for name in names:
        number = name[len(path.name) + 1 :]
        if name.startswith(path.name + ".") and number.isascii() and number.isdigit() and number[0] != "0":
            found.append(int(number))
    return sorted(found)


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


@dataclass
class Part:
    """An open file of a log."""

    fd: int
    number: int
    inode: int
    size: int


def open_all(path: Path, *, only_newest: bool = False) -> list[Part]:
    """The files of a log, oldest first, each once although they may be renamed meanwhile.

    They are opened newest first: a file only ever moves to a higher number, so none that exists can be missed. If the
    log is rotated meanwhile, it is done again: of two rotations the first one's new file would be out of its order.
    """
    for _ in range(10):
        found = open_once(path, only_newest=only_newest)
        if only_newest or not found or _inode(path) in (found[-1].inode, None):
            break
        for part in found:
            os.close(part.fd)
    else:
        return open_once(path, only_newest=only_newest)
    return found


def _inode(path: Path) -> int | None:
    try:
        return os.stat(path).st_ino
    except OSError:  # just being rotated
        return None


def open_once(path: Path, *, only_newest: bool) -> list[Part]:
    """`open_all` without a look whether the log was rotated meanwhile."""
    found: dict[int, Part] = {}
    number, last = 0, 0 if only_newest else max(rotated(path), default=0)
    while number <= last:
        try:
            fd = os.open(numbered(path, number), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            pass
        else:
            status = os.fstat(fd)
            if status.st_ino in found:
                os.close(fd)
            else:
                found[status.st_ino] = Part(fd, number, status.st_ino, status.st_size)
        number += 1
        if number > last and not only_newest:
            last = max(rotated(path), default=0)
    return list(reversed(found.values()))


@contextlib.contextmanager
def opened(path: Path, *, only_newest: bool = False) -> Iterator[list[Part]]:
    """The files of `open_all`, open within the block."""
    files = open_all(path, only_newest=only_newest)
    try:
        yield files
    finally:
        for part in files:
            os.close(part.fd)


def read_all(path: Path, *, chunk: int = 1 << 16) -> Iterator[bytes]:
    """The whole log, oldest first, in pieces; for a download. It ends where the log ended when it began."""
    with contextlib.ExitStack() as stack:
        opened = open_all(path)
        files = [stack.enter_context(open(part.fd, "rb")) for part in opened]
        for index, (part, file) in enumerate(zip(opened, files, strict=True)):
            left = part.size
            if index:
                data = file.read(min(FINGERPRINT, left))
                left -= len(data)
                yield body(data)
            while left > 0 and (data := file.read(min(chunk, left))):
                left -= len(data)
                yield data


def body(data: bytes) -> bytes:
    """The beginning of a file without its line on which part of the log it is."""
    first, newline, rest = data.partition(b"\n")
    return rest if newline and PART_LINE.fullmatch(first.decode("utf-8", "replace")) else data


def whole_lines(data: bytes, *, last: bool = False) -> bytes:
    """Bytes up to the end of the last whole line; all of them if no more will come."""
    return data if last else data[: data.rfind(b"\n") + 1]
