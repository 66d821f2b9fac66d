from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import CheckpointError
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, encode_header, header_length, read_headers

GOOD: dict[str, dict[str, object]] = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(folder: Path, header: object, data: int = 32, name: str = SINGLE_FILE, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return folder


def test_reads_what_safetensors_wrote(tmp_path: Path) -> None:
    save_file(
        {"w": torch.ones(3, 5, dtype=torch.float16), "i": torch.ones(2, dtype=torch.int32)}, tmp_path / SINGLE_FILE
    )
    found = {t.name: t for t in read_headers(tmp_path)}
    assert (found["w"].dtype, found["w"].shape, found["w"].nbytes, found["w"].file) == ("F16", (3, 5), 30, SINGLE_FILE)
    assert (found["i"].dtype, found["i"].nbytes) == ("I32", 8)


def test_reads_the_shards_of_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"b": torch.ones(3)}, tmp_path / "y.safetensors")
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    assert {t.name: t.file for t in read_headers(tmp_path)} == index["weight_map"]


def edit(**changes: object) -> dict[str, object]:
    return GOOD | {"b": GOOD["b"] | changes}


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        (GOOD, 31, "truncated"),
        (GOOD, 33, "describe only 32"),
        (edit(data_offsets=[20, 28]), 32, "overlaps"),
        (edit(data_offsets=[28, 36]), 36, "hole"),
        (edit(data_offsets=[24, 30]), 30, "needs 8"),
        (edit(data_offsets=[32, 24]), 32, "needs 8"),
        (edit(data_offsets=[-8, 0]), 32, "data_offsets"),
        (edit(shape=[-4]), 32, "shape"),
        (edit(shape=[4.0]), 32, "shape"),
        (edit(shape=[True, 4]), 32, "shape"),
        (edit(dtype="PICKLE"), 32, "dtype"),
        (edit(dtype=["F32"]), 32, "dtype"),
        (GOOD | {"c": 3}, 32, "lacks"),
        ([1, 2], 0, "not a JSON object"),
        (b"{nonsense", 0, "not JSON"),
        (b'{"a":1,"a":2}', 0, "twice"),
        (b"\xff\xfe{}", 0, "not JSON"),
        (b"[" * 100_000, 0, "not JSON"),
    ],
)
def test_refuses_corrupt_headers(tmp_path: Path, header: object, data: int, reason: str) -> None:
    write(tmp_path, header, data)
    with pytest.raises(CheckpointError, match=reason) as error:
        read_headers(tmp_path)
    assert SINGLE_FILE in error.value.message


@pytest.mark.parametrize("length", [10**6, 2**63])
def test_refuses_a_header_longer_than_the_file(tmp_path: Path, length: int) -> None:
    write(tmp_path, GOOD, length=length)
    with pytest.raises(CheckpointError, match="truncated"):
        read_headers(tmp_path)


def test_refuses_a_huge_header_without_reading_it(tmp_path: Path) -> None:
    with open(tmp_path / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", 2**31))
        file.truncate(2**32)  # sparse
    with pytest.raises(CheckpointError, match="at most 40000000"):
        read_headers(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_refuses_files_too_short_for_a_header(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match="truncated"):
        read_headers(tmp_path)


def test_refuses_pickles_by_name(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match=r"pickle \(pytorch_model.bin\).*never loaded"):
        read_headers(tmp_path)


def test_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        read_headers(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="found no safetensors"):
        read_headers(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "gone.safetensors"}}))
    with pytest.raises(CheckpointError, match="gone.safetensors.*missing"):
        read_headers(tmp_path)


@pytest.mark.parametrize("index", ["{}", "[]", '{"weight_map": {}}', '{"weight_map": {"a": 3}}', "nonsense"])
def test_refuses_broken_indexes(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX_FILE).write_text(index)
    with pytest.raises(CheckpointError, match="index.json"):
        read_headers(tmp_path)


def test_refuses_shards_outside_of_the_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    save_file({"a": torch.ones(2)}, outside)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="same folder"):
        read_headers(folder)


def test_encoded_header_has_the_predicted_length_and_is_readable(tmp_path: Path) -> None:
    tensors = {'odd "name" é': ("F32", (2,), 0, 8), "scalar": ("I64", (), 8, 16)}
    header = encode_header(tensors)
    assert len(header) == 8 + header_length((n, t[0], t[1]) for n, t in tensors.items())
    assert len(header) % 8 == 0
    (tmp_path / SINGLE_FILE).write_bytes(header + struct.pack("<ffq", 1.5, -2.0, 7))
    loaded = load_file(tmp_path / SINGLE_FILE)
    assert loaded['odd "name" é'].tolist() == [1.5, -2.0]
    assert loaded["scalar"].item() == 7
    assert len(read_headers(tmp_path)) == 2
