"""Tensors on their way into safetensors shards, kept so that a killed process can go on byte for byte.

A shard's header names all of its tensors, so it can only be written when the shard is full. Until then the data lies
in `shard-N.part`. After a commit, full shards are assembled: `shard-N.safetensors`, made under another name and then
renamed, so that it is there completely or not at all; only then its `.part` goes. `finish` gives the shards their final
names. A state taken by `commit` says which tensors each shard has. Whatever happened afterwards, their bytes are at the
beginning of the `.part`, of the assembled shard or of the finished one, and `restore` finds them.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.files import sync_path
from backend.formats.headers import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, encode_header

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
OURS = re.compile(
    r"shard-\d{5}\.(part|safetensors)(\.tmp)?|model-\d{5}-of-\d{5}\.safetensors"
    rf"|{re.escape(SINGLE_FILE)}|{re.escape(INDEX_FILE)}|config\.json(\.tmp)?"
)
COPY_BYTES = 2**22


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of writing a file into one that says what to do.

    Raises:
        CheckpointError: If the disk is full or the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        reason, what = error.strerror or str(error), "Make the folder writable"
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(path.parent).free
            reason, what = f"{reason}, {free / 2**20:.0f} MiB of its disk are free", "Free some space"
        raise CheckpointError(
            f"{path} could not be written ({reason}). {what} and resume; what was finished before is kept."
        ) from error


@dataclass
class Shard:
    """One shard: its tensors in order, and whether it is assembled.

    Attributes:
        entries: name -> (dtype, shape, begin, end), as in the header.
        nbytes: Of all tensors.
        assembled: `shard-N.safetensors` is there and `shard-N.part` is not.
    """

    entries: dict[str, tuple[str, tuple[int, ...], int, int]] = field(default_factory=dict)
    nbytes: int = 0
    assembled: bool = False

    def append(self, name: str, dtype: str, shape: Sequence[int]) -> None:
        """Note a tensor behind those that are there."""
        nbytes = DTYPE_BYTES[dtype]
        for n in shape:
            nbytes *= n
        self.entries[name] = (dtype, tuple(shape), self.nbytes, self.nbytes + nbytes)
        self.nbytes += nbytes


class ShardSpool:
    """Appends tensors to shards in a folder.

    Nothing in the folder is touched before the first `append` (which starts afresh) or `restore` (which goes on).

    Args:
        folder: Where; it exists.
        max_shard_bytes: A shard is full when the next tensor would exceed this.
    """

    def __init__(self, folder: Path, max_shard_bytes: int) -> None:
        self.folder = folder
        self._max = max_shard_bytes
        self._shards: list[Shard] = []
        self._names: set[str] = set()
        self._full_at_commit = 0
        self._handle: int | None = None  # of the last shard's .part

    def __del__(self) -> None:
        self._close()

    def append(self, name: str, dtype: str, shape: Sequence[int], data: memoryview) -> None:
        """Store one tensor.

        Raises:
            CheckpointError: If the name is taken, or the disk is full.
        """
        if name in self._names:
            raise CheckpointError(f"{name} was stored twice; the source checkpoint names it more than once.")
        if not self._shards:
            self._clear(keep=set())
        if not self._shards or (self._shards[-1].nbytes and self._shards[-1].nbytes + len(data) > self._max):
            self._open_next()
        path = self._part(len(self._shards))
        assert self._handle is not None
        with writing(path):
            at = self._shards[-1].nbytes  # not simply at the end, where a failed attempt may have left something
            while data:
                written = os.pwrite(self._handle, data, at)
                data, at = data[written:], at + written
        self._shards[-1].append(name, dtype, shape)
        self._names.add(name)

    def commit(self) -> list[list[list[Any]]]:
        """Bring everything to the disk.

        Returns:
            For each shard its tensors as [name, dtype, shape]: JSON values, from which `restore` goes on.
        """
        with writing(self._part(len(self._shards))):
            if self._handle is not None:
                os.fsync(self._handle)
            sync_path(self.folder)
        self._full_at_commit = max(len(self._shards) - 1, 0)
        return [[[n, dtype, list(shape)] for n, (dtype, shape, _, _) in s.entries.items()] for s in self._shards]

    def seal(self) -> None:
        """Assemble the shards that were full at the last commit; to be called when its state is safe."""
        for number in range(1, self._full_at_commit + 1):
            self._assemble(number)

    def restore(self, state: Sequence[Sequence[Sequence[Any]]]) -> None:
        """Go on right after the commit that returned `state`. What came later is dropped.

        Raises:
            CheckpointError: If the folder does not hold what was committed.
        """
        self._close()
        (self.folder / "config.json").unlink(missing_ok=True)  # from here on the folder is unfinished again
        self._shards = [Shard() for _ in state]
        for shard, tensors in zip(self._shards, state, strict=True):
            for name, dtype, shape in tensors:
                shard.append(name, dtype, shape)
        self._names = {name for shard in self._shards for name in shard.entries}
        self._full_at_commit = max(len(self._shards) - 1, 0)
        keep: set[Path] = set()
        for number, shard in enumerate(self._shards, start=1):
            keep.add(self._recover(number, shard, full=number < len(self._shards)))
        self._clear(keep)
        if self._shards:
            part = self._part(len(self._shards))
            with writing(part):
                self._handle = os.open(part, os.O_WRONLY)

    def finish(self) -> dict[str, str]:
        """Assemble all shards and give them their final names.

        Returns:
            Tensor name -> file name.
        """
        if not self._shards:
            self._clear(keep=set())
            self._open_next()
        self.commit()
        self._close()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(self._shards, start=1):
            self._assemble(number)
            final = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            with writing(self.folder / final):
                os.replace(self._assembled(number), self.folder / final)
            weight_map.update(dict.fromkeys(shard.entries, final))
        sync_path(self.folder)
        return weight_map

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.nbytes for shard in self._shards)

    def _part(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.part"

    def _assembled(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _open_next(self) -> None:
        if self._handle is not None:
            with writing(self._part(len(self._shards))):
                os.fsync(self._handle)
        self._close()
        path = self._part(len(self._shards) + 1)
        with writing(path):
            self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._shards.append(Shard())

    def _close(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _assemble(self, number: int) -> None:
        shard, part, path = self._shards[number - 1], self._part(number), self._assembled(number)
        if shard.assembled:
            return
        _write_whole(path, encode_header(shard.entries), part, 0, shard.nbytes)
        part.unlink()
        shard.assembled = True

    def _recover(self, number: int, shard: Shard, *, full: bool) -> Path:
        """Have a shard's committed bytes in its `.part`, or, if it was full, assembled; returns where they are."""
        part, path = self._part(number), self._assembled(number)
        done = [path, *self.folder.glob(f"model-{number:05d}-of-*.safetensors")]
        done += [self.folder / SINGLE_FILE] if number == 1 else []
        header = encode_header(shard.entries)
        for file in (file for file in done if file.is_file()):
            if full and _starts_with(file, header) and file.stat().st_size == len(header) + shard.nbytes:
                os.replace(file, path)
                shard.assembled = True
                return path
        if part.is_file() and part.stat().st_size >= shard.nbytes:
            os.truncate(part, shard.nbytes)
            return part
        for file in (file for file in done if file.is_file()):
            begin = _data_begin(file)
            if file.stat().st_size >= begin + shard.nbytes:
                _write_whole(part, b"", file, begin, shard.nbytes)
                return part
        raise CheckpointError(
            f"{self.folder} cannot be continued: the {shard.nbytes} bytes of shard {number} that were finished are "
            "not there any more. Remove the folder and start again."
        )

    def _clear(self, keep: set[Path]) -> None:
        """Remove what earlier attempts left."""
        for path in self.folder.iterdir():
            if OURS.fullmatch(path.name) and path not in keep:
                path.unlink()


def _write_whole(path: Path, start: bytes, source: Path, begin: int, nbytes: int) -> None:
    """Write `start` and a span of another file; `path` is there completely or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with writing(path):
        try:
            with open(temporary, "wb", buffering=0) as out, open(source, "rb", buffering=0) as data:
                data.seek(begin)
                chunk: bytes | memoryview = start
                while chunk or nbytes:
                    while chunk:
                        chunk = chunk[out.write(chunk) :]
                    chunk = memoryview(data.read(min(COPY_BYTES, nbytes)))
                    if nbytes and not chunk:
                        raise CheckpointError(f"{source} is shorter than what was written to it; start again.")
                    nbytes -= len(chunk)
                os.fsync(out.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)  # half a file would only make a full disk fuller
        sync_path(path.parent)


def _starts_with(path: Path, start: bytes) -> bool:
    with open(path, "rb") as file:
        return file.read(len(start)) == start


def _data_begin(path: Path) -> int:
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    return 8 + int(length)
