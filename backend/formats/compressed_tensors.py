"""The `pack-quantized` layout of compressed-tensors checkpoints, bit for bit.

| tensor            | type, shape                          | content                                             |
|-------------------|--------------------------------------|-----------------------------------------------------|
| weight_packed     | int32 (out, ceil(in * bits / 32))    | codes, packed along in                              |
| weight_scale      | 16 bits (out, groups)                | steps                                               |
| weight_zero_point | int32 (ceil(out * bits / 32), groups) | codes that stand for 0, packed along out            |
| weight_shape      | int64 (2,)                           | out, in                                             |
| weight_g_idx      | int32 (in,)                          | group of each input; only where groups are no runs  |

A row of codes is one stream of bits: code i occupies bits i * bits to (i + 1) * bits - 1, words are little-endian,
and the last word is filled with zeros. The library's codes are signed, -2^(bits - 1) to 2^(bits - 1) - 1, and stored
with 2^(bits - 1) added, so what is stored are our unsigned codes and zeros. Symmetric weights store no zeros.
Source: checkpoints written by compressed-tensors 0.19.0; older ones hold zeros unpacked, as signed int8 (out, groups).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backend.errors import CheckpointError
from backend.formats.layouts import WORD_BITS, words
from backend.formats.weight import QuantizedWeight

REQUIRED = ("weight_packed", "weight_scale", "weight_shape")
OPTIONAL = ("weight_zero_point", "weight_g_idx")
CODES = 8  # codes at a time: they fill `bits` whole bytes


def pack(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Pack one Linear.

    Returns:
        The tensors of the table, contiguous; `weight_zero_point` only if the weight is not symmetric.
    """
    tensors = {
        "weight_packed": pack_bits(weight.q, weight.bits),
        "weight_scale": weight.scale.contiguous(),
        "weight_shape": torch.tensor(weight.q.shape, dtype=torch.int64),
    }
    if not weight.symmetric:
        tensors["weight_zero_point"] = pack_bits(weight.zero.T, weight.bits).T.contiguous()
    return tensors


def unpack(tensors: Mapping[str, Tensor], bits: int, group_size: int) -> QuantizedWeight:
    """The inverse of `pack`; columns stay where they are, whatever `weight_g_idx` says.

    Args:
        tensors: Those of the table.
        bits: Bits per code.
        group_size: Inputs per group; -1: all of a row.

    Raises:
        CheckpointError: If the shapes contradict each other, the bits or the group size.
    """
    packed, scale, shape = (tensors[part] for part in REQUIRED)
    out, width = (int(n) for n in shape.tolist()) if shape.numel() == 2 else (0, 0)
    groups = 1 if group_size == -1 else width // group_size
    expected = (out, words(width, bits)), (out, groups)
    if (tuple(packed.shape), tuple(scale.shape)) != expected or not groups or width % groups:
        raise CheckpointError(
            f"weight_packed and weight_scale have shapes {tuple(packed.shape)} and {tuple(scale.shape)}; a weight of "
            f"shape {shape.tolist()} with {bits} bits and group size {group_size} needs {expected[0]} and {expected[1]}"
        )
    q = unpack_bits(packed, bits, width)
    middle = 1 << (bits - 1)
    stored = tensors.get("weight_zero_point")
    if stored is None:
        return QuantizedWeight(q, scale, torch.full_like(scale, middle, dtype=torch.uint8), bits, symmetric=True)
    packed_shape = (words(out, bits), groups)
    if stored.dtype == torch.int32 and tuple(stored.shape) == packed_shape:
        zero = unpack_bits(stored.T, bits, out).T.contiguous()
    elif stored.dtype == torch.int8 and stored.shape == scale.shape:
        zero = (stored.to(torch.int16) + middle).to(torch.uint8)
    else:
        raise CheckpointError(
            f"weight_zero_point is {str(stored.dtype).removeprefix('torch.')} {tuple(stored.shape)}; needed is int32 "
            f"{packed_shape} or int8 {tuple(scale.shape)}"
        )
    return QuantizedWeight(q, scale, zero, bits)


def column_order(g_idx: Tensor, width: int, groups: int) -> Tensor:
    """The order (in,) of the columns that makes every group a run.

    Raises:
        CheckpointError: If the groups are not of equal size.
    """
    counts = torch.bincount(g_idx.long().clamp(min=0), minlength=groups)
    if tuple(g_idx.shape) != (width,) or counts.tolist() != [width // groups] * groups:
        raise CheckpointError(f"weight_g_idx does not put {width // groups} of the {width} inputs into each group")
    return g_idx.argsort(stable=True)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes (rows, n) -> int32 (rows, ceil(n * bits / 32))."""
    rows, n = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -n % WORD_BITS)).reshape(rows, -1, CODES)
    stream = padded[..., 0].to(torch.int64)
    for k in range(1, CODES):
        stream |= padded[..., k].to(torch.int64) << (k * bits)
    data = stream.unsqueeze(-1).view(torch.uint8)[..., :bits].contiguous()  # (rows, n/8, bits) bytes
    return data.view(rows, -1).view(torch.int32)[:, : words(n, bits)].contiguous()


def unpack_bits(packed: Tensor, bits: int, n: int) -> Tensor:
    """int32 (rows, ceil(n * bits / 32)) -> uint8 codes (rows, n)."""
    rows = packed.shape[0]
    missing = words(-(-n // WORD_BITS) * WORD_BITS, bits) - packed.shape[1]
    data = torch.nn.functional.pad(packed, (0, missing)).contiguous().view(torch.uint8).view(rows, -1, bits)
    stream = torch.nn.functional.pad(data, (0, CODES - bits)).view(torch.int64).squeeze(-1)  # (rows, n/8)
    codes = torch.empty(*stream.shape, CODES, dtype=torch.uint8, device=packed.device)
    for k in range(CODES):  # one at a time: eight int64 numbers per byte of codes would be a lot of memory
        codes[..., k] = (stream >> (k * bits)) & ((1 << bits) - 1)
    return codes.view(rows, -1)[:, :n].contiguous()
