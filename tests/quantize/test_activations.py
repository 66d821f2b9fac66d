from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from backend.errors import CheckpointError
from backend.quantize.activations import Activations

SHAPES = [(2, 5, 8), (3, 4, 8), (1, 7, 8)]
ELEMENTS = sum(a * b * c for a, b, c in SHAPES)


def parts(generation: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(generation)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


def fill(activations: Activations, generation: int, dtype: torch.dtype = torch.float32, first: bool = False) -> None:
    for number, part in enumerate(parts(generation, dtype)):
        activations.write(number, part, first=first)


def equal(activations: Activations, generation: int, dtype: torch.dtype = torch.float32) -> bool:
    found = [activations.read(number) for number in range(len(activations))]
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, parts(generation, dtype), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("kept", [False, True])
def test_memory_and_disk_hold_the_same(tmp_path: Path, dtype: torch.dtype, limit: int, kept: bool) -> None:
    activations = Activations(SHAPES, dtype, tmp_path / "a" if kept else None, limit)
    assert len(activations) == 3
    assert activations.nbytes == ELEMENTS * dtype.itemsize
    fill(activations, 0, dtype, first=True)
    for generation in range(4):
        assert activations.generation == generation
        for number, part in enumerate(parts(generation + 1, dtype)):
            assert torch.equal(activations.read(number), parts(generation, dtype)[number])  # inputs stay until used
            activations.write(number, part)
        activations.advance()
        assert equal(activations, generation + 1, dtype)
    activations.close()


def test_the_limit_decides_where_they_live(tmp_path: Path) -> None:
    for limit, files in ((ELEMENTS * 4 - 1, 1), (ELEMENTS * 4, 0)):
        folder = tmp_path / str(limit)
        fill(Activations(SHAPES, torch.float32, folder, limit), 0, first=True)
        assert len(list(folder.iterdir())) == files


def test_parts_are_cast_and_made_contiguous(tmp_path: Path) -> None:
    for limit in (0, 10**9):
        activations = Activations([(2, 3, 4)], torch.bfloat16, tmp_path / str(limit), limit)
        part = torch.randn(4, 3, 2).transpose(0, 2)
        activations.write(0, part, first=True)
        assert torch.equal(activations.read(0), part.bfloat16())


@pytest.mark.parametrize("limit", [0, 10**9])
@pytest.mark.parametrize("limit_after", [0, 10**9])
def test_another_process_goes_on(tmp_path: Path, limit: int, limit_after: int) -> None:
    first = Activations(SHAPES, torch.float32, tmp_path, limit)
    fill(first, 0, first=True)
    for generation in (1, 2, 3):
        fill(first, generation)
        first.advance()
    for number, part in enumerate(parts(4)[:2]):  # dies in the next layer
        first.write(number, part)
    for generation in (2, 3):  # the layer before, whose progress may be the last one recorded, and the current one
        second = Activations(SHAPES, torch.float32, tmp_path, limit_after)
        overwritten = limit == 0 and generation == 2
        assert second.restore(generation)
        assert second.generation == generation
        assert equal(second, generation) != overwritten
    fill(second, 4)
    second.advance()
    assert equal(second, 4)


def test_what_is_not_there_whole_is_not_restored(tmp_path: Path) -> None:
    first = Activations(SHAPES, torch.float32, tmp_path)
    fill(first, 0, first=True)
    fill(first, 1)
    first.advance()
    assert not Activations(SHAPES, torch.float32, tmp_path).restore(2)
    assert not Activations(SHAPES, torch.bfloat16, tmp_path).restore(1)
    assert not Activations(SHAPES[:2], torch.float32, tmp_path).restore(1)
    path = tmp_path / "activations-1.bin"
    path.write_bytes(path.read_bytes()[:-1])
    again = Activations(SHAPES, torch.float32, tmp_path)
    assert not again.restore(1)
    assert again.generation == 0


def test_larger_files_of_another_run_are_not_in_the_way(tmp_path: Path) -> None:
    for limit in (0, 10**9):
        folder = tmp_path / str(limit)
        folder.mkdir()
        for number in (0, 1):
            (folder / f"activations-{number}.bin").write_bytes(b"x" * 10 * ELEMENTS)
        first = Activations(SHAPES, torch.float32, folder, limit)
        fill(first, 0, first=True)
        fill(first, 1)
        first.advance()
        second = Activations(SHAPES, torch.float32, folder, limit)
        assert second.restore(1)
        assert equal(second, 1)


def test_truncated_while_in_use(tmp_path: Path) -> None:
    activations = Activations(SHAPES, torch.float32, tmp_path, memory_limit=0)
    fill(activations, 0, first=True)
    path = tmp_path / "activations-0.bin"
    path.write_bytes(path.read_bytes()[:-100])
    activations.read(0)
    with pytest.raises(CheckpointError, match=r"activations-0.bin is truncated; start the job again"):
        activations.read(2)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writing beyond this fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    on_disk = Activations(SHAPES, torch.float32, tmp_path / "disk", memory_limit=0)
    in_memory = Activations(SHAPES, torch.float32, tmp_path / "memory")
    fill(in_memory, 0, first=True)
    fill(in_memory, 1)
    told = rf"activations-%d.bin: .* after \d+ of {ELEMENTS * 4} bytes of activations; free some space and resume"
    with file_size_limit(ELEMENTS * 2):
        with pytest.raises(CheckpointError, match=told % 0) as caught:
            fill(on_disk, 0, first=True)
        assert isinstance(caught.value.__context__, OSError)  # from which the runner knows a full disk
        with pytest.raises(CheckpointError, match=told % 1):
            in_memory.advance()
    fill(on_disk, 0, first=True)  # with room again
    assert equal(on_disk, 0)


def test_temporary_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    activations = Activations(SHAPES, torch.float32, None, memory_limit=0)
    fill(activations, 0, first=True)
    assert len(list(tmp_path.glob("quantdeck-*/*"))) == 1
    activations.close()
    assert not list(tmp_path.iterdir())
