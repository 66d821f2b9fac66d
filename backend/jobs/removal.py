"""Removing files below a home, and nothing else.

Each folder on the way is opened from the one above it without following links, so that neither a link that lies there
nor one that is put there meanwhile leads out. What is removed can be removed again: what is gone already is no error.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from backend.errors import JobError

_WAY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAPPED = re.compile(r"^\S+ \S+ \S+ \S+ \S+ +(/.*?)(?: \(deleted\))?$", re.MULTILINE)


@contextmanager
def opened_folder(root: Path, folder: Path) -> Iterator[int | None]:
    """A descriptor of a folder below `root`; None if it is not there.

    Raises:
        JobError: If it lies elsewhere, or something on the way is no folder (a symbolic link, say).
    """
    if not folder.is_relative_to(root) or ".." in folder.relative_to(root).parts:
        raise JobError(f"{folder} lies outside of {root}; nothing was removed there")
    inside: int = os.open(root, _WAY & ~os.O_NOFOLLOW)
    way, there = root, True
    try:
        for part in folder.relative_to(root).parts:
            way /= part
            try:
                above, inside = inside, os.open(part, _WAY, dir_fd=inside)
            except FileNotFoundError:
                there = False
                break
            except OSError:
                raise _no_folder(way) from None
            os.close(above)
        yield inside if there else None
    finally:
        os.close(inside)


def _no_folder(path: Path) -> JobError:
    what = "a symbolic link" if path.is_symlink() else "no folder"
    return JobError(f"{path} is {what}; nothing behind it was removed. Look at it and remove it by hand")


def remove(root: Path, path: Path) -> None:
    """Remove a file, or a folder with all that is in it, and have that reach the disk.

    Links inside the folder are removed, not what they lead to.

    Raises:
        JobError: If it is a symbolic link itself, lies behind one, or cannot be removed.
    """
    with opened_folder(root, path.parent) as above:
        if above is None:
            return
        try:
            mode = os.lstat(path.name, dir_fd=above).st_mode
            if stat.S_ISLNK(mode):
                raise _no_folder(path)
            shutil.rmtree(path.name, dir_fd=above) if stat.S_ISDIR(mode) else os.unlink(path.name, dir_fd=above)
            os.fsync(above)
        except FileNotFoundError:
            return
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise JobError(f"{path} cannot be removed: {error.strerror}{where}") from None


def check_way(root: Path, path: Path) -> None:
    """Raise what `remove` would raise about links, without removing anything."""
    with opened_folder(root, path.parent) as above:
        if above is not None and path.is_symlink():
            raise _no_folder(path)


def bytes_of(root: Path, path: Path) -> int:
    """Bytes that become free if `remove` is called: a file that has another name elsewhere stays on the disk.

    Raises:
        JobError: If it lies behind a symbolic link.
    """
    with opened_folder(root, path.parent) as above:
        if above is None:
            return 0
        try:
            found = os.lstat(path.name, dir_fd=above)
        except FileNotFoundError:
            return 0
        if stat.S_ISREG(found.st_mode):
            return found.st_size if found.st_nlink == 1 else 0
        if not stat.S_ISDIR(found.st_mode):
            return 0
        total = 0
        names: dict[tuple[int, int], int] = {}
        for _, _, files, folder in os.fwalk(path.name, dir_fd=above):
            for name in files:
                try:
                    one = os.lstat(name, dir_fd=folder)
                except FileNotFoundError:
                    continue
                key = (one.st_dev, one.st_ino)
                names[key] = names.get(key, 0) + 1
                if stat.S_ISREG(one.st_mode) and names[key] == one.st_nlink:
                    total += one.st_size
        return total


def used_files(root: Path) -> list[tuple[Path, str]]:
    """Files below `root` that other processes of this user have open or mapped into their memory, and which process."""
    found: set[tuple[Path, str]] = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            paths = {match[1] for match in _MAPPED.finditer((process / "maps").read_text(errors="replace"))}
            for descriptor in (process / "fd").iterdir():
                paths.add(os.readlink(descriptor))
            who = f"process {process.name} ({(process / 'comm').read_text().strip()})"
        except OSError:
            continue  # it has ended, or is another user's
        found |= {(Path(path), who) for path in paths if path.startswith(f"{root}/")}
    return sorted(found)
