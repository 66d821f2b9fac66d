"""The hidden states of all calibration tokens between two decoder layers, in memory or on disk.

Two generations exist while a layer runs: its inputs and its outputs. On disk they are two files that take turns, so
the inputs of the layer that was running when the process died are still there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import CheckpointError

MEMORY_LIMIT = 2 * 2**30  # bytes of hidden states kept in memory
Shape = tuple[int, int, int]  # samples, tokens, width


class Activations:
    """Hidden states in parts of known shapes.

    Args:
        shapes: Of the parts.
        dtype: Their type.
        folder: Where `commit` keeps them for a later process; None if that is not needed.
        memory_limit: Bytes; above it the parts live in files (in `folder`, or a temporary one).
        name: Of the files.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        dtype: torch.dtype,
        folder: Path | None = None,
        memory_limit: int = MEMORY_LIMIT,
        name: str = "activations",
    ) -> None:
        self._shapes, self._dtype, self._name = list(shapes), dtype, name
        sizes = [prod(shape) * dtype.itemsize for shape in shapes]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        self.nbytes = self._offsets[-1]
        self._parts: list[Tensor | None] | None = None if self.nbytes > memory_limit else [None] * len(sizes)
        self._temporary = None if folder else tempfile.TemporaryDirectory(prefix="quantdeck-")
        self._folder = folder or Path(self._temporary.name)  # type: ignore[union-attr]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._kept = folder is not None
        self.generation = 0  # index of the layer whose inputs these are

    def __len__(self) -> int:
        return len(self._shapes)

    def read(self, number: int) -> Tensor:
        """The inputs of the current layer, part by part, on the CPU."""
        if self._parts is not None:
            part = self._parts[number]
            assert part is not None
            return part
        return self._load(number, self.generation)

    def write(self, number: int, part: Tensor, *, first: bool = False) -> None:
        """Store a part of the current layer's outputs (`first`: of the first layer's inputs).

        Raises:
            CheckpointError: If the disk is full.
        """
        assert tuple(part.shape) == self._shapes[number]
        part = part.to("cpu", self._dtype)
        if self._parts is not None:
            self._parts[number] = part
        else:
            self._store(number, part, self.generation + (0 if first else 1))

    def advance(self) -> None:
        """The layer is done: its outputs are the next one's inputs. Brings them to disk if they are to be kept."""
        self.generation += 1
        if not self._kept:
            return
        if self._parts is not None:
            for number, part in enumerate(self._parts):
                assert part is not None
                self._store(number, part, self.generation)
        with open(self._path(self.generation), "rb") as file:
            os.fsync(file.fileno())

    def restore(self, generation: int) -> bool:
        """Go on with what an earlier process kept; False if it is not there whole."""
        path = self._path(generation)
        if not path.is_file() or path.stat().st_size != self.nbytes:
            return False
        self.generation = generation
        if self._parts is not None:
            self._parts = [self._load(number, generation) for number in range(len(self))]
        return True

    def close(self) -> None:
        """Remove temporary files."""
        if self._temporary is not None:
            self._temporary.cleanup()

    def _path(self, generation: int) -> Path:
        return self._folder / f"{self._name}-{generation % 2}.bin"

    def _store(self, number: int, part: Tensor, generation: int) -> None:
        path = self._path(generation)
        data = part.contiguous().view(-1).view(torch.uint8).numpy().data
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                if os.fstat(descriptor).st_size > self.nbytes:  # of an earlier run with more tokens
                    os.ftruncate(descriptor, self.nbytes)
                written = 0
                while written < len(data):
                    written += os.pwrite(descriptor, data[written:], self._offsets[number] + written)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror} after {self._offsets[number]} of {self.nbytes} bytes of activations; "
                "free some space and resume the job."
            ) from None

    def _load(self, number: int, generation: int) -> Tensor:
        shape = self._shapes[number]
        buffer = bytearray(prod(shape) * self._dtype.itemsize)
        with open(self._path(generation), "rb", buffering=0) as file:
            file.seek(self._offsets[number])
            view, filled = memoryview(buffer), 0
            while filled < len(buffer):
                count = file.readinto(view[filled:])
                if not count:
                    raise CheckpointError(f"{self._path(generation)} is truncated; start the job again.")
                filled += count
        return torch.frombuffer(buffer, dtype=self._dtype).view(shape)
