"""The AutoAWQ checkpoint layouts, bit for bit: GEMM and GEMV packing of 4-bit weights.

Eight 4-bit values share an int32; nibble k is bits 4k..4k+3.

| layout | qweight            | qzeros              | scales (float16)  | packed along               |
|--------|--------------------|---------------------|-------------------|----------------------------|
| GEMM   | (in, out/8)        | (in/g, out/8)       | (in/g, out)       | out, order 0 2 4 6 1 3 5 7 |
| GEMV   | (out, in/8)        | (out, Z)            | (out, 8Z)         | in, sequential             |

W[o, i] = (q - zero) * scale, zeros stored as they are. GEMV pads groups with zeros to Z words (`zeros_words`).
Source: the checkpoints of AutoAWQ 0.2.9. Symmetric weights are stored as zero = 8 everywhere: the layouts have
no room for "no zeros", and every reader subtracts what is stored. Hence `zero_point` in the configuration, which
tells readers whether `qzeros` count, is always true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError
from backend.formats.layouts import PACK, zeros_words
from backend.formats.weight import QuantizedWeight

VERSIONS = ("GEMM", "GEMV")
GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column that nibble k holds
GEMM_INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble that holds column j


def quantization_config(
    bits: int, group_size: int, modules_to_not_convert: Sequence[str], version: str
) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers, vLLM and AutoAWQ know the layout."""
    return {
        "bits": bits,
        "group_size": group_size,
        "modules_to_not_convert": list(modules_to_not_convert) or None,
        "quant_method": "awq",
        "version": version.lower(),
        "zero_point": True,
    }


def pack(weight: QuantizedWeight, version: str) -> dict[str, Tensor]:
    """Pack one Linear.

    Args:
        weight: 4-bit codes and zeros (0..15).
        version: `GEMM` (out must be a multiple of 8) or `GEMV`.

    Returns:
        `qweight`, `qzeros`, `scales`, contiguous.
    """
    if version == "GEMM":
        return {
            "qweight": _pack_words(weight.q.T, GEMM_ORDER),
            "qzeros": _pack_words(weight.zero.T, GEMM_ORDER),
            "scales": weight.scale.T.contiguous(),
        }
    padding = (0, zeros_words(weight.scale.shape[1], weight.group_size) * PACK - weight.scale.shape[1])
    return {
        "qweight": _pack_words(weight.q, range(PACK)),
        "qzeros": _pack_words(torch.nn.functional.pad(weight.zero, padding), range(PACK)),
        "scales": torch.nn.functional.pad(weight.scale, padding),
    }


def unpack(tensors: Mapping[str, Tensor], version: str, group_size: int) -> QuantizedWeight:
    """The inverse of `pack`.

    Raises:
        CheckpointError: If the shapes contradict each other or the group size.
    """
    qweight, qzeros, scales = tensors["qweight"], tensors["qzeros"], tensors["scales"]
    shapes = tuple(tuple(t.shape) for t in (qweight, qzeros, scales))
    if version == "GEMM":
        width, words = qweight.shape
        groups = width // group_size
        expected = (width, words), (groups, words), (groups, words * PACK)
    else:
        out, words = qweight.shape
        groups = words * PACK // group_size
        padded = zeros_words(groups, group_size)
        expected = (out, words), (out, padded), (out, padded * PACK)
    if shapes != expected:
        raise CheckpointError(
            f"qweight, qzeros and scales have shapes {shapes}; {version} with group size {group_size} needs {expected}"
        )
    if version == "GEMM":
        q = _unpack_words(qweight, GEMM_INVERSE).T.contiguous()
        return QuantizedWeight(q, scales.T.contiguous(), _unpack_words(qzeros, GEMM_INVERSE).T.contiguous())
    zero = _unpack_words(qzeros, range(PACK))[:, :groups].contiguous()
    return QuantizedWeight(_unpack_words(qweight, range(PACK)), scales[:, :groups].contiguous(), zero)


def _pack_words(values: Tensor, order: Sequence[int]) -> Tensor:
    """uint8 values 0..15 (rows, n) -> int32 (rows, n/8). Two nibbles make a byte, four bytes a little-endian word."""
    nibbles = values.reshape(values.shape[0], -1, PACK)[..., list(order)]
    return (nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)).contiguous().view(torch.int32).squeeze(-1)


def _unpack_words(words: Tensor, inverse: Sequence[int]) -> Tensor:
    """int32 (rows, n/8) -> uint8 values 0..15 (rows, n)."""
    data = words.contiguous().view(torch.uint8).view(*words.shape, PACK // 2)
    nibbles = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)  # (rows, n/8, 8)
    return nibbles[..., list(inverse)].flatten(1)
