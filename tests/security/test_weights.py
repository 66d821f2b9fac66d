"""Broken and lying weight files: each is refused with its name, none is believed.

The payloads are real: each would leave a canary file behind if anything opened it carelessly.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from backend.errors import CheckpointError, ConfigErrors
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, read_headers
from backend.formats.loader import load_model
from backend.jobs.preflight import check_job
from backend.paths import Home
from tests.security.folders import NATIVE, job


def with_header(folder: Path, header: Any, data: int = 0, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        ({}, 0, 2**63, "truncated"),
        ({}, 0, 2**64 - 1, "truncated"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, None, "overlaps"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, 8, None, "overlaps"),
        ({"a": entry("F32", [2], 4, 12)}, 12, None, "hole"),
        ({"a": entry("F32", [4], 0, 16)}, 8, None, "truncated"),
        ({"a": entry("F32", [2**40], 0, 2**42)}, 8, None, "truncated"),
        ({"a": entry("F32", [2**62] * 16, 0, 8)}, 8, None, "needs"),
        ({"a": entry("F32", [2**62] * 200_000, 0, 8)}, 8, None, "has shape"),
        ({"a": entry("F32", [2], 8, 0)}, 8, None, "needs 8"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', 8, None, "shape"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', 8, None, "not JSON"),
        (b'{"a":' * 100_000, 8, None, "not JSON"),
    ],
)
def test_broken_weights_are_refused_without_being_believed(
    home: Home, model: Path, header: Any, data: int, length: int | None, says: str
) -> None:
    with_header(model, header, data, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=says) as caught:
        read_headers(model)
    assert SINGLE_FILE in caught.value.message
    assert len(caught.value.message) < 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    with pytest.raises(ConfigErrors, match=says):
        check_job(job(model, **NATIVE), home)


def test_a_header_as_large_as_the_disk_is_not_read(model: Path) -> None:
    with open(model / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="at most 40000000"):
        read_headers(model)


def test_every_cut_of_a_shard_is_noticed(model: Path) -> None:
    path = model / SINGLE_FILE
    whole = path.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:end])
        for load in (read_headers, load_model):
            with pytest.raises(CheckpointError, match=SINGLE_FILE):
                load(model)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load_model(model)


def split(folder: Path) -> dict[str, str]:
    """Two shards and their index, in place of the single file."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    places = {name: f"s{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in ("s0.safetensors", "s1.safetensors"):
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    return places


def test_an_index_that_lies_is_refused(model: Path, tmp_path: Path) -> None:
    places = split(model)
    load_model(model)
    name = next(iter(places))

    def refused(weight_map: Any, says: str) -> None:
        (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        for load in (read_headers, load_model):
            with pytest.raises(CheckpointError, match=says):
                load(model)

    shutil.copyfile(model / "s0.safetensors", tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/../s0.safetensors", "..", ""):
        refused(places | {name: outside}, "same folder")
    refused(places | {name: "s0.bin"}, "same folder")
    refused(places | {name: ["s0.safetensors"]}, "not a shard index")
    refused(places | {name: "s2.safetensors"}, "s2.safetensors.*missing")
    refused(places | {name: "s1.safetensors" if places[name] == "s0.safetensors" else "s0.safetensors"}, "it is in s")
    refused(places | {"model.extra.weight": "s0.safetensors"}, "no shard has it")
    (model / INDEX_FILE).write_text(
        json.dumps({"weight_map": {k: v for k, v in places.items() if v == "s0.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="in none of its files"):
        load_model(model)
    (model / "s1.safetensors").unlink()
    os.mkfifo(model / "s1.safetensors")
    refused(places, "s1.safetensors.*missing")
