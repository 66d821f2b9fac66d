"""The AQLM checkpoint layout, bit for bit: codes, codebooks and scales of an additive weight.

| tensor    | shape            | type                       |
|-----------|------------------|----------------------------|
| codes     | (out, in / G, K) | int8 up to 8 bits, or int16 |
| codebooks | (K, 2^B, 1, G)   | float16                    |
| scales    | (out, 1, 1, 1)   | float16                    |

A code v of B bits is stored in two's complement of B bits: v - 2^B where v >= 2^(B-1).
Source: the checkpoints that transformers 5.17 with aqlm 1.1.7 load, and Egiazarian et al. 2024 (arXiv 2401.06118).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError, ConfigError, ModelError
from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.scheme import AdditiveScheme

METHOD = "aqlm"
PARTS = ("codes", "codebooks", "scales")
CODE_TYPES = {8: torch.int8, 16: torch.int16}


def quantization_config(scheme: AdditiveScheme, kept: Sequence[str], quantized: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json by which transformers, vLLM and aqlm know the layout.

    Args:
        scheme: Of all quantized Linears; the layout has one per checkpoint.
        kept: Names of the Linears that are not quantized, in and outside of the decoder layers.
        quantized: Names of those that are.
    """
    names = list(quantized)
    listed = [pattern_for(name, names) for name in kept] + [f"{name}.weight" for name in kept]
    return {
        "quant_method": METHOD,
        "in_group_size": scheme.in_group_size,
        "out_group_size": 1,
        "num_codebooks": scheme.num_codebooks,
        "nbits_per_codebook": scheme.nbits_per_codebook,
        "linear_weights_not_to_quantize": listed,
    }


def pattern_for(name: str, quantized: Iterable[str]) -> str:
    """How a module that stays in 16 bits is listed: by its name, or, where that would also hit others, by `name$`.

    transformers takes what is listed for a regular expression at the beginning of a module's name, or for its end,
    so that `mlp.gate` also stands for `mlp.gate_proj`. Older releases and other programs look for the path of the
    weight alone, which is why that is listed beside it.
    """
    hit = any(re.match(name, other) or other.endswith(name) for other in quantized)
    return f"{name}$" if hit else name


def scheme_of(config: Mapping[str, Any]) -> AdditiveScheme:
    """The scheme that a `quantization_config` states.

    Raises:
        ModelError: If a value is missing or not among those that can be loaded.
    """
    if config.get("out_group_size", 1) != 1:
        raise ModelError(
            f"AQLM with out_group_size {config['out_group_size']!r} cannot be loaded: allowed is 1, codes that stand "
            "for weights of one output."
        )
    keys = ("num_codebooks", "nbits_per_codebook", "in_group_size")
    try:
        return AdditiveScheme(**{key: config.get(key) for key in keys})  # type: ignore[arg-type]
    except ConfigError as error:
        raise ModelError(f"The AQLM quantization_config cannot be used: {error.message}") from None


def pack(weight: AdditiveWeight) -> dict[str, Tensor]:
    """Pack one Linear; codebooks and scales are rounded to float16.

    Returns:
        `codes`, `codebooks`, `scales`, contiguous.
    """
    stored = weight.stored()
    nbits = weight.nbits_per_codebook
    half = 1 << (nbits - 1)
    codes = ((weight.codes + half) & ((1 << nbits) - 1)) - half
    return {
        "codes": codes.to(CODE_TYPES[8 if nbits <= 8 else 16]).contiguous(),
        "codebooks": stored.codebooks.unsqueeze(2).contiguous(),
        "scales": stored.scales.view(-1, 1, 1, 1).contiguous(),
    }


def unpack(tensors: Mapping[str, Tensor], scheme: AdditiveScheme) -> AdditiveWeight:
    """The inverse of `pack`.

    Raises:
        CheckpointError: If shapes, types or values contradict each other or the scheme.
    """
    codes, codebooks, scales = (tensors[part] for part in PARTS)
    found = tuple(tuple(t.shape) for t in (codes, codebooks, scales))
    K, G, words = scheme.num_codebooks, scheme.in_group_size, scheme.words  # noqa: N806
    out, groups = (*codes.shape, 0, 0)[:2]
    expected = ((out, groups, K), (K, words, 1, G), (out, 1, 1, 1))
    if found != expected or not codes.numel():
        raise CheckpointError(
            f"codes, codebooks and scales have shapes {found}; {scheme.label} needs {expected}, from config.json"
        )
    if codes.dtype != CODE_TYPES[scheme.code_bits]:
        raise CheckpointError(
            f"codes are {codes.dtype}; {scheme.nbits_per_codebook} bits are stored as {CODE_TYPES[scheme.code_bits]}"
        )
    half = words // 2
    if codes.numel() and (int(codes.min()) < -half or int(codes.max()) >= half):
        raise CheckpointError(
            f"codes lie between {int(codes.min())} and {int(codes.max())}; allowed are {-half} to {half - 1}"
        )
    for part, tensor in (("codebooks", codebooks), ("scales", scales)):
        if not tensor.is_floating_point():
            raise CheckpointError(f"{part} are {tensor.dtype}; a floating type is needed")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{part} are not all finite")
    unsigned = codes.to(torch.int32) & (words - 1)
    return AdditiveWeight(unsigned, codebooks.squeeze(2), scales.view(-1))
