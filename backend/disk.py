"""A full disk: how it is recognised in other libraries' errors, how it is told, and room kept to be able to tell it."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

from backend.errors import JobError

NO_SPACE_EXIT = errno.ENOSPC
"""Exit code of a stage program that ran out of disk space: the one message that needs no disk to be delivered."""

NEARLY_FULL = 64 * 1024
BALLAST_BYTES = 2**20
_WORDS = ("no space left on device", "os error 28", "disk quota exceeded", "disk is full")
_LEADING_PATH = re.compile(r"(/[^:\n]+): ")
BYTE_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "bytes": 1}
"""Bytes of each unit in which sizes are told, the largest first."""


class DiskFullError(JobError):
    """A file could not be written for lack of space.

    Args:
        path: The file or folder that was being written.
        needed: Bytes that still have to be written, at most; None if unknown.
    """

    def __init__(self, path: Path | str, needed: int | None = None) -> None:
        disk = mount_point(Path(path))
        wanted = f"up to {amount(needed)} more are needed, " if needed else ""
        super().__init__(
            f"no space left on the disk at {disk} while writing {path}: {wanted}{amount(free_bytes(disk))} are "
            "free. Nothing half-written was published. Free some space and resume the job: it goes on where it stopped"
        )


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that the disk or the user's quota is full.

    Rust and C++ libraries (safetensors, SQLite) tell it in words only.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error).lower() for words in _WORDS):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def unwritten_path(error: BaseException | None) -> str:
    """The file that could not be written, if an error or one that it came from names it; else empty."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, OSError) and error.filename:
            return str(error.filename)
        if match := _LEADING_PATH.match(str(error)):
            return match.group(1)
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return ""


def mount_point(path: Path) -> Path:
    """Where the disk of a path begins in the tree."""
    folder = existing_folder(path).resolve()
    return next((p for p in (folder, *folder.parents) if p.is_mount()), folder)


def existing_folder(path: Path) -> Path:
    """The nearest folder on the way up that exists."""
    return next((p for p in (path, *path.parents) if p.is_dir()), Path("/"))


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write on the disk of a path."""
    return shutil.disk_usage(existing_folder(path)).free


class Ballast:
    """A file that only takes up room, dropped when the disk is full so that the reason can still be stored.

    Args:
        path: Where it lies, on the disk of the job store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> None:
        """Reserve the room.

        Raises:
            DiskFullError: If there is not even that much.
        """
        try:
            with open(self.path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, BALLAST_BYTES)
        except OSError as error:
            self.drop()
            if is_disk_full(error):
                raise DiskFullError(self.path, BALLAST_BYTES) from error
            raise

    def drop(self) -> None:
        """Give the room back."""
        self.path.unlink(missing_ok=True)


def amount(n_bytes: int) -> str:
    """Bytes in decimal units with three digits, e.g. `4.21 MB`."""
    unit, scale = next(((u, s) for u, s in BYTE_UNITS.items() if n_bytes >= s), ("bytes", 1))
    return f"{n_bytes / scale:.3g} {unit}" if scale > 1 else f"{n_bytes} bytes"
