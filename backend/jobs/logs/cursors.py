"""A reader's place in a log as a short text, valid while the log is rotated and in every process."""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass

from backend.jobs.logs.files import FINGERPRINT, Part

BEGINNING = "0-0-0"
"""Cursor of a log that does not exist yet."""
CURSOR_LENGTH = 60


@dataclass
class File:
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

    def holds(self, place: Place) -> bool:
        """Whether a place is one of this file, among what was read of it."""
        return (
            self.inode == place.inode
            and place.offset <= self.end
            and _checksum(self.head, place.offset) == place.checksum
        )

    def look_at(self, part: Part) -> None:
        """Read its beginning, unless that is known."""
        if len(self.head) < FINGERPRINT:
            self.head = os.pread(part.fd, FINGERPRINT, 0)


@dataclass(frozen=True)
class Place:
    """A cursor's content."""

    inode: int
    offset: int
    checksum: int

    @classmethod
    def of(cls, cursor: str) -> Place | None:
        """The place that a cursor names; None if it is no cursor. Cursors come from browsers: they may be anything."""
        if len(cursor) > CURSOR_LENGTH:
            return None
        try:
            inode, offset, checksum = (int(field, 16) for field in cursor.split("-"))
        except ValueError:
            return None
        return cls(inode, offset, checksum) if offset >= 0 else None


def is_of(part: Part, file: File) -> bool:
    """Whether an open file is one that was read before, grown or not."""
    head = os.pread(part.fd, FINGERPRINT, 0)
    return part.inode == file.inode and part.size >= file.end and head[: len(file.head)] == file.head


def has(part: Part, place: Place) -> bool:
    """Whether a place is one of an open file."""
    if part.inode != place.inode or part.size < place.offset:
        return False
    return _checksum(os.pread(part.fd, FINGERPRINT, 0), place.offset) == place.checksum


def _checksum(head: bytes, offset: int) -> int:
    return zlib.crc32(head[: min(offset, FINGERPRINT)])
