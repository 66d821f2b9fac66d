"""safetensors headers, read strictly and written with a predictable size. Standard library only.

A safetensors file is an 8-byte little-endian header length, a JSON header
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}`, and one data buffer that the tensors must cover
without holes or overlaps. A file that breaks any of this is refused before a byte of its data is used.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from backend.errors import CheckpointError
from backend.formats.regular import open_regular, read_regular

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz")
# Headers of the largest models known have less than 10 MB. Parsed JSON takes up to 20 times its size in memory.
MAX_HEADER_BYTES = 40_000_000
MAX_INDEX_BYTES = 40_000_000
MAX_DIMENSIONS = 16

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor, as its file's header describes it.

    Attributes:
        name: Key in the state dict.
        dtype: safetensors name, e.g. `BF16`.
        shape: Sizes.
        file: Name of the file inside the model folder.
        nbytes: Bytes of data.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    nbytes: int


def read_headers(model_dir: Path | str) -> list[TensorInfo]:
    """Describe every tensor of a model folder from its validated safetensors headers; no weights are read.

    Takes `model.safetensors`, or the shards that `model.safetensors.index.json` names.

    Raises:
        CheckpointError: If there are no safetensors files (pickle files are refused), or one is missing,
            truncated, corrupt or contradicts the index. The message names the file.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}; give the folder of a model.")
    tensors: list[TensorInfo] = []
    seen: dict[str, str] = {}
    index = _read_index(folder) if not (folder / SINGLE_FILE).is_file() and (folder / INDEX_FILE).is_file() else {}
    for name in weight_files(folder):
        for tensor in read_header(folder / name):
            if tensor.name in seen:
                raise CheckpointError(
                    f"{folder}: tensor {tensor.name!r} is stored twice, in {seen[tensor.name]} and in {name}; "
                    "remove one of the two files or get the checkpoint again."
                )
            seen[tensor.name] = name
            tensors.append(tensor)
    for tensor_name, file in index.items():
        if seen.get(tensor_name) != file:
            there = f"it is in {seen[tensor_name]}" if tensor_name in seen else "no shard has it"
            raise CheckpointError(
                f"{folder / INDEX_FILE} says that {file} holds {tensor_name!r}, but {there}; the index and the shards "
                "do not belong together. Get the checkpoint again."
            )
    return tensors


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that make up the checkpoint in `folder`, sorted.

    Raises:
        CheckpointError: As `read_headers`.
    """
    if (folder / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_files(folder)
    if pickles := pickle_files(folder):
        raise CheckpointError(
            f"{folder} holds its weights only as pickle ({', '.join(pickles[:3])}), which can run code when it is "
            f"opened and is never loaded here; convert the model to {SINGLE_FILE} with save_pretrained."
        )
    others = sorted(p.name for p in folder.glob("*.safetensors"))
    found = f"found only {', '.join(others[:3])}" if others else "found no safetensors file"
    raise CheckpointError(f"{folder} must hold {SINGLE_FILE} or {INDEX_FILE} with its shards; {found}.")


def pickle_files(folder: Path) -> list[str]:
    """Names of the files in a folder that are opened by unpickling, sorted."""
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in PICKLE_SUFFIXES)


def has_only_pickles(folder: Path) -> bool:
    """Whether a folder's weights are there as pickle and not as safetensors."""
    if (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file():
        return False
    return bool(pickle_files(folder)) and not list(folder.glob("*.safetensors"))


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor -> shard, as the index says.

    Raises:
        CheckpointError: If it is no index, or names a shard outside of the folder.
    """
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(read_regular(path, MAX_INDEX_BYTES).decode("utf-8"))["weight_map"]
        files = set(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a shard index ({error}); get the file again.") from None
    for name in sorted(files, key=str):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {name!r}; shards must be .safetensors files in the same folder.")
    found: dict[str, str] = weight_map
    return found


def _indexed_files(folder: Path) -> list[str]:
    names = sorted(set(_read_index(folder).values()))
    if not names:
        raise CheckpointError(f"{folder / INDEX_FILE} names no shard; get the file again.")
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: shard {name} of {INDEX_FILE} is missing; complete the download.")
    return names


def read_header(path: Path) -> list[TensorInfo]:
    """Read and check the header of one safetensors file.

    Raises:
        CheckpointError: If the file is truncated or corrupt; the message names it and says where.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if len(start) < 8 or 8 + length > size:
                raise _bad(path, f"it is truncated: {size} bytes, but its header alone should end at {8 + length}")
            if length > MAX_HEADER_BYTES:
                raise _bad(path, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are allowed")
            raw = file.read(length)
    except OSError as error:
        raise _bad(path, f"it cannot be read ({error})") from None
    tensors, spans = _parse(path, raw)
    _check_layout(path, spans, size - 8 - length)
    return tensors


def _parse(path: Path, raw: bytes) -> tuple[list[TensorInfo], list[tuple[int, int, str]]]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    return _described(path, header)


def described(file: str, header: Mapping[str, Any]) -> list[TensorInfo]:
    """The tensors of a header that was read elsewhere, e.g. of a file on the Hub, as strictly as of one here.

    Args:
        file: Name of the file.
        header: Tensor name -> `dtype`, `shape` and `data_offsets`.

    Raises:
        CheckpointError: If an entry is not as the format wants it, or tensors overlap or leave holes.
    """
    tensors, spans = _described(Path(file), header)
    _check_layout(Path(file), spans, max((end for _, end, _ in spans), default=0))
    return tensors


def _described(path: Path, header: Mapping[str, Any]) -> tuple[list[TensorInfo], list[tuple[int, int, str]]]:
    tensors: list[TensorInfo] = []
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = _entry(path, name, entry)
        nbytes = prod(shape) * DTYPE_BYTES[dtype]
        if end - begin != nbytes:
            raise _bad(path, f"tensor {name!r} has {end - begin} bytes; {dtype} of shape {shape} needs {nbytes}")
        tensors.append(TensorInfo(name, dtype, tuple(shape), path.name, nbytes))
        spans.append((begin, end, name))
    return tensors, spans


def _entry(path: Path, name: str, entry: Any) -> tuple[str, list[int], tuple[int, int]]:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise _bad(path, f"the entry of tensor {name!r} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise _bad(path, f"tensor {name!r} has dtype {dtype!r}; known are {', '.join(DTYPE_BYTES)}")
    if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
        raise _bad(path, f"tensor {name!r} has shape {str(shape)[:80]}")
    if not _sizes(offsets) or len(offsets) != 2:
        raise _bad(path, f"tensor {name!r} has data_offsets {offsets!r}")
    return dtype, shape, (offsets[0], offsets[1])


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def _check_layout(path: Path, spans: list[tuple[int, int, str]], buffer: int) -> None:
    """The tensors must tile the data buffer: no overlap, no hole, nothing beyond its end."""
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            what = "overlaps another tensor" if begin < at else "leaves a hole before it"
            raise _bad(path, f"tensor {name!r} {what} (starts at {begin}, expected {at})")
        at = end
    if at > buffer:
        raise _bad(path, f"it is truncated: its tensors need {at} bytes and it holds {buffer}")
    if at < buffer:
        raise _bad(path, f"it holds {buffer} bytes of data and its tensors describe only {at}")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key occurs twice")
    return table


def _bad(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a usable safetensors file: {reason}. Get the file again.")


def header_length(names_shapes: Iterable[tuple[str, str, tuple[int, ...]]]) -> int:
    """Bytes that `encode_header` gives for tensors of these (name, dtype, shape), whatever their offsets.

    Room is kept for offsets of 15 digits, so the size of a future file is known before its data is.
    """
    widest = 10**15 - 1
    table = {name: (dtype, shape, widest, widest) for name, dtype, shape in names_shapes}
    return -(-len(_header_json(table)) // 8) * 8


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    """The length field and the padded JSON header for `name -> (dtype, shape, begin, end)`.

    The spaces at its end are allowed by the format; they align the data to 8 bytes and make the length
    independent of the offsets.
    """
    length = header_length((name, dtype, shape) for name, (dtype, shape, _, _) in tensors.items())
    return struct.pack("<Q", length) + _header_json(tensors).ljust(length)


def _header_json(tensors: Mapping[str, tuple[str, tuple[int, ...], int, int]]) -> bytes:
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, begin, end) in tensors.items():
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
