"""Bytes of a checkpoint: of one on disk, and of the artefact that a recipe will give. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from backend.formats.headers import DTYPE_BYTES, TensorInfo, header_length, weight_files
from backend.formats.layouts import (
    AQLM,
    AUTOAWQ_GEMM,
    Stored,
    check_layout,
    linear_tensors,
    refusal,
    scale_dtype,
    stored_dtype,
)
from backend.formats.modelopt_layout import ModeloptScheme, folded
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import Recipe, Scheme

MAX_SHARD_BYTES = 4 * 2**30
HEADER_FIELD_BYTES = 8
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")
"""A decoder layer in a tensor's name: model.layers.N, gpt_neox.layers.N, transformer.h.N, transformer.blocks.N."""
TIED_HEADS = ("lm_head.weight", "embed_out.weight")


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
    recipe: Recipe,
    *,
    layout: str = AUTOAWQ_GEMM,
    dtype: str | None = "float16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Bytes that the weight files of the quantized artefact will have, exactly.

    Args:
        headers: `read_headers` of the 16-bit model.
        config: Its config.json (says whether the head is tied to the embeddings).
        recipe: What happens to each Linear.
        layout: One of `backend.formats.layouts.LAYOUTS`.
        dtype: Type of the tensors that stay unquantized; None keeps theirs.
        max_shard_bytes: As for the writer.

    Raises:
        ConfigError: If layout or dtype is unknown.
    """
    check_layout(layout, dtype)
    headers = list(headers)

    def scheme_of(tensor: TensorInfo) -> Scheme | None:
        return _scheme(tensor, recipe, layout)

    return _total(drop_tied_head(headers, config), scheme_of, layout, dtype, max_shard_bytes, headers)


def predicted_additive_size(
    headers: Iterable[TensorInfo],
    config: Mapping[str, Any],
    scheme: AdditiveScheme,
    *,
    keep: tuple[str, ...] = ("lm_head",),
    dtype: str | None = "float16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """As `predicted_size`, for the `aqlm` layout.

    Args:
        headers: `read_headers` of the 16-bit model.
        config: Its config.json.
        scheme: Of all Linears of the decoder layers that it fits.
        keep: Linears whose name contains one of these stay in 16 bits.
        dtype: Type of the tensors that stay unquantized; None keeps theirs.
        max_shard_bytes: As for the writer.

    Raises:
        ConfigError: If the dtype is unknown.
    """
    check_layout(AQLM, dtype)
    headers = list(headers)

    def scheme_of(tensor: TensorInfo) -> AdditiveScheme | None:
        fits = is_quantized_linear(tensor.name, tensor.shape, keep) and not scheme.misfit(*tensor.shape)
        return scheme if fits else None

    return _total(drop_tied_head(headers, config), scheme_of, AQLM, dtype, max_shard_bytes, headers)


def predicted_modelopt_size(
    headers: Iterable[TensorInfo],
    config: Mapping[str, Any],
    scheme: ModeloptScheme,
    *,
    keep: tuple[str, ...] = ("lm_head",),
    dtype: str | None = "float16",
) -> int:
    """Bytes of modelopt's export in one file, as safetensors itself writes it; each further shard adds some hundred.

    Args:
        headers: `read_headers` of the 16-bit model.
        config: Its config.json.
        scheme: Of all Linears of the decoder layers.
        keep: Linears whose name contains one of these stay in 16 bits.
        dtype: Type of the tensors that stay unquantized; None keeps theirs.

    Raises:
        ConfigError: If the dtype is unknown.
    """
    check_layout(AUTOAWQ_GEMM, dtype)
    stored: list[Stored] = []
    tensors = drop_tied_head(headers, config)
    inner = folded([tensor.name for tensor in tensors])
    for tensor in tensors:
        kind = stored_dtype(tensor.dtype, dtype)
        if is_quantized_linear(tensor.name, tensor.shape, keep):
            stored += scheme.tensors(tensor.name.removesuffix(".weight"), tensor.shape, kind, inner)
        else:
            stored.append((tensor.name, kind, tensor.shape))
    return library_size(stored)


def drop_tied_head(headers: Iterable[TensorInfo], config: Mapping[str, Any]) -> list[TensorInfo]:
    """Leave out the copy of the embeddings that some checkpoints with a tied head store as a weight of its own."""
    tied = bool(config.get("tie_word_embeddings"))
    return [t for t in headers if not (tied and t.name in TIED_HEADS)]


def artefact_order(name: str) -> tuple[int, str]:
    """Sort key of the order in which tensors are written: everything outside the layers, then layer by layer."""
    layer = LAYER.search(name)
    return (int(layer.group(1)) if layer else -1, name)


def is_layer_linear(name: str, shape: tuple[int, ...]) -> bool:
    """True for the weight of a Linear inside a decoder layer."""
    return len(shape) == 2 and name.endswith(".weight") and LAYER.search(name) is not None


def is_quantized_linear(name: str, shape: tuple[int, ...], keep: tuple[str, ...]) -> bool:
    """True for the weight of a Linear inside a decoder layer that is not on the keep list."""
    return is_layer_linear(name, shape) and not any(part in name for part in keep)


def library_size(tensors: Iterable[Stored]) -> int:
    """Bytes of a file that the safetensors library writes: wide types first, then by name, the header padded to 8."""
    at = 0
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, dtype, shape in sorted(tensors, key=lambda t: (-DTYPE_BYTES[t[1]], t[0])):
        end = at + DTYPE_BYTES[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    header = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    return HEADER_FIELD_BYTES + -(-len(header) // 8) * 8 + at


def _total(
    tensors: list[TensorInfo],
    scheme_of: Callable[[TensorInfo], Scheme | AdditiveScheme | None],
    layout: str,
    dtype: str | None,
    max_shard_bytes: int,
    source: list[TensorInfo],
) -> int:
    """Bytes of the shards that the writer fills with these tensors, in the order of `artefact_order`."""
    scales = scale_dtype(layout, dtype, source)
    total = shard = 0
    names: list[Stored] = []
    for stored in _artefact_tensors(tensors, scheme_of, layout, dtype, scales):
        nbytes = DTYPE_BYTES[stored[1]] * prod(stored[2])
        if shard and shard + nbytes > max_shard_bytes:
            total += HEADER_FIELD_BYTES + header_length(names) + shard
            names, shard = [], 0
        names.append(stored)
        shard += nbytes
    return total + HEADER_FIELD_BYTES + header_length(names) + shard


def _artefact_tensors(
    headers: list[TensorInfo],
    scheme_of: Callable[[TensorInfo], Scheme | AdditiveScheme | None],
    layout: str,
    dtype: str | None,
    scales: str,
) -> Iterator[Stored]:
    for tensor in sorted(headers, key=lambda t: artefact_order(t.name)):
        scheme = scheme_of(tensor)
        if scheme is None:
            yield tensor.name, stored_dtype(tensor.dtype, dtype), tensor.shape
        else:
            yield from linear_tensors(layout, tensor.name.removesuffix(".weight"), scheme, tensor.shape, scales)


def _scheme(tensor: TensorInfo, recipe: Recipe, layout: str) -> Scheme | None:
    """How a tensor is quantized; None if it is stored as it is."""
    if not is_layer_linear(tensor.name, tensor.shape):
        return None
    out, width = tensor.shape
    scheme = recipe.scheme_for(tensor.name.removesuffix(".weight"), width)
    if isinstance(scheme, str) or refusal(layout, scheme, (out, width), recipe.scheme.group_size):
        return None
    return scheme
