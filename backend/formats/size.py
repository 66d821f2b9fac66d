"""Bytes of a checkpoint: of one on disk, and of the AutoAWQ artefact that a job will write. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from backend.formats.headers import DTYPE_BYTES, TensorInfo, header_length, weight_files

MAX_SHARD_BYTES = 4 * 2**30
HEADER_FIELD_BYTES = 8
PACK = 8  # 4-bit values in a 32-bit word
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")

Stored = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


class SizeSettings(Protocol):
    """The part of an algorithm's settings that decides sizes; `backend.quantize.AwqSettings` has it."""

    @property
    def group_size(self) -> int:
        """Weights that share a scale."""

    @property
    def modules_to_not_convert(self) -> tuple[str, ...]:
        """Parts of names of Linears that stay in 16 bits."""


def weight_bytes(model_dir: Path | str) -> int:
    """Bytes on disk of the safetensors files that make up a checkpoint.

    Raises:
        CheckpointError: If there are none, or a shard is missing.
    """
    folder = Path(model_dir)
    return sum((folder / name).stat().st_size for name in weight_files(folder))


def predicted_size(
    headers: Iterable[TensorInfo],
    config: Mapping[str, Any],
    settings: SizeSettings,
    *,
    version: str = "GEMM",
    dtype: str | None = "float16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Bytes that the weight files of the quantized artefact will have, exactly.

    Args:
        headers: `read_headers` of the 16-bit model.
        config: Its config.json (says whether the head is tied to the embeddings).
        settings: Group size and the modules left alone.
        version: `GEMM` or `GEMV`; GEMV pads its zeros.
        dtype: Type of the tensors that stay unquantized; None keeps theirs.
        max_shard_bytes: As for the writer.
    """
    kept = drop_tied_head(headers, config)
    total = shard = 0
    names: list[Stored] = []
    for stored in _artefact_tensors(kept, settings, version.upper(), dtype):
        nbytes = _nbytes(stored)
        if shard and shard + nbytes > max_shard_bytes:
            total += HEADER_FIELD_BYTES + header_length(names) + shard
            names, shard = [], 0
        names.append(stored)
        shard += nbytes
    return total + HEADER_FIELD_BYTES + header_length(names) + shard


def drop_tied_head(headers: Iterable[TensorInfo], config: Mapping[str, Any]) -> list[TensorInfo]:
    """Leave out the copy of the embeddings that some checkpoints with a tied head store as `lm_head.weight`."""
    tied = bool(config.get("tie_word_embeddings"))
    return [t for t in headers if not (tied and t.name == "lm_head.weight")]


def artefact_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which tensors are written: everything outside the layers, then layer by layer."""
    layer = LAYER.search(name)
    return (int(layer.group(1)) if layer else -1, name)


def zeros_words(groups: int, group_size: int) -> int:
    """Words per row of GEMV's `qzeros`: the kernels read them in blocks that depend on the group size."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    base = -(-groups // PACK)
    return -(-base // multiple) * multiple


def is_quantized_linear(name: str, shape: tuple[int, ...], keep: tuple[str, ...]) -> bool:
    """True for the weight of a Linear inside a decoder layer that is not on the keep list."""
    return (
        len(shape) == 2
        and name.endswith(".weight")
        and LAYER.search(name) is not None
        and not any(part in name for part in keep)
    )


def _artefact_tensors(
    headers: list[TensorInfo], settings: SizeSettings, version: str, dtype: str | None
) -> Iterator[Stored]:
    for tensor in sorted(headers, key=lambda t: artefact_order(t.name)):
        if not is_quantized_linear(tensor.name, tensor.shape, settings.modules_to_not_convert):
            yield tensor.name, _stored_dtype(tensor.dtype, dtype), tensor.shape
            continue
        out, width = tensor.shape
        groups = width // settings.group_size
        prefix = tensor.name.removesuffix(".weight")
        if version == "GEMM":
            shapes = (width, out // PACK), (groups, out // PACK), (groups, out)
        else:
            words = zeros_words(groups, settings.group_size)
            shapes = (out, width // PACK), (out, words), (out, words * PACK)
        yield f"{prefix}.qweight", "I32", shapes[0]
        yield f"{prefix}.qzeros", "I32", shapes[1]
        yield f"{prefix}.scales", "F16", shapes[2]


def _stored_dtype(source: str, dtype: str | None) -> str:
    floating = source in ("F64", "F32", "F16", "BF16")
    return {"float16": "F16", "bfloat16": "BF16"}[dtype] if dtype and floating else source


def _nbytes(stored: Stored) -> int:
    count = DTYPE_BYTES[stored[1]]
    for n in stored[2]:
        count *= n
    return count
