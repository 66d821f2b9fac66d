"""By which code a loaded model computes its tokens, in words: a speed means little without it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from backend.formats import lut_kernel
from backend.formats.packed_int8 import PackedInt8Linear
from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.stored_linears import AqlmLinears, quantization_of, stored_linears


def decode_path(model: nn.Module) -> str:
    """How the Linears of a loaded model are run, the most frequent way first.

    Returns:
        E.g. `bfloat16 weights`, `packed int4 kernel` or `AQLM 2x8 g8: look-up tables over packed codes (numba)`;
        several joined by `; `. A head in 16 bits beside quantized Linears is not mentioned.
    """
    found = Counter(_paths(model))
    if getattr(model, "hf_quantizer", None) is not None:
        found = Counter(["weights decompressed by the compressed-tensors package"])
    if not found:
        types = Counter(p.dtype for p in model.parameters() if p.is_floating_point())
        return f"{_name(types.most_common(1)[0][0])} weights" if types else "no weights"
    return "; ".join(path for path, _ in found.most_common())


def warm_up(model_dir: Path | str, device: str = "cpu") -> None:
    """Import and compile what the Linears of a folder need, without reading weights.

    Raises:
        ModelError: If the folder cannot be loaded.
    """
    folder = Path(model_dir)
    quantization = quantization_of(folder)
    packed = stored_linears(folder, quantization) if quantization else None
    if isinstance(packed, AqlmLinears) and device == "cpu" and lut_kernel.serves(packed.scheme.nbits_per_codebook):
        lut_kernel.warm_up()


def _paths(module: nn.Module) -> Iterator[str]:
    """The paths of the quantized Linears in a module, each once."""
    if isinstance(module, PackedInt4Linear):
        yield "packed int4 kernel" if module.takes_rows(1) else "int4 codes, dequantised at every call"
    elif isinstance(module, PackedInt8Linear):
        yield "packed int4 kernel on two planes of 8-bit codes"
    elif path := getattr(module, "decode_path", None):
        yield path
    else:
        for child in module.children():
            yield from _paths(child)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
