"""Bits per weight of a quantized model: known before from shapes, and counted afterwards in the files.

Everything that stands for a Linear's weight counts: codes, codebooks, scales and zeros, with whatever a layout pads
them. Biases do not, nor what says how to read the codes. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

from safetensors import SafetensorError, safe_open

from backend.errors import CheckpointError, ConfigError
from backend.formats.headers import DTYPE_BYTES, TensorInfo, read_headers
from backend.formats.layouts import AQLM, DTYPES, FLOATING, PACK, Stored, linear_tensors, refusal
from backend.formats.modelopt_layout import ModeloptScheme, folded
from backend.formats.size import LAYER, is_layer_linear, is_quantized_linear
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import Recipe, Scheme

NO_WEIGHT = ("bias", "weight_shape")
"""Parts of a quantized Linear that do not stand for its weight."""
NO_WEIGHT_PREFIXES = ("input_", "output_", "k_", "v_", "q_")
"""Parts of compressed-tensors that quantize activations."""


@dataclass(frozen=True)
class StoredBits:
    """What the Linears of a model's decoder layers take.

    Attributes:
        quantized: Bits per weight of the quantized ones; None if there are none.
        linears: Bits per weight of all of them, those that stayed in 16 bits included.
        weights: How many weights they all have.
        kept: How many of these stayed in 16 bits.
    """

    quantized: float | None
    linears: float
    weights: int
    kept: int


def true_bits(model_dir: Path | str) -> float:
    """Bits per quantized weight of a folder, counted in its files; of a 16-bit model, bits per weight of its Linears.

    Raises:
        ModelError, CheckpointError: As `measured_bits`.
    """
    found = measured_bits(model_dir)
    return found.linears if found.quantized is None else found.quantized


def measured_bits(model_dir: Path | str) -> StoredBits:
    """Count the bytes of every Linear of the decoder layers, from the headers of the files.

    Raises:
        CheckpointError: If files are broken or a Linear lacks parts, or there is no Linear in numbered layers.
    """
    folder = Path(model_dir)
    modules: dict[str, dict[str, TensorInfo]] = {}
    for tensor in read_headers(folder):
        prefix, _, part = tensor.name.rpartition(".")
        if LAYER.search(tensor.name):
            modules.setdefault(prefix, {})[part] = tensor
    counts = [0, 0, 0, 0]  # weights and bytes of the quantized ones, then of the others
    for prefix, parts in modules.items():
        weights = _quantized_weights(folder, prefix, parts)
        plain = parts.get("weight")
        if weights:
            counts[0] += weights
            counts[1] += sum(t.nbytes for part, t in parts.items() if _stands_for_weight(part))
        elif plain and is_layer_linear(plain.name, plain.shape):
            counts[2] += prod(plain.shape)
            counts[3] += plain.nbytes
    total = counts[0] + counts[2]
    if not total:
        raise CheckpointError(f"{folder} holds no Linear in numbered decoder layers, whose bits could be counted.")
    quantized = 8 * counts[1] / counts[0] if counts[0] else None
    return StoredBits(quantized, 8 * (counts[1] + counts[3]) / total, total, counts[2])


def predicted_bits(
    shapes: Mapping[str, tuple[int, int]],
    recipe: AdditiveScheme | Recipe,
    layout: str = AQLM,
    *,
    keep: tuple[str, ...] = ("lm_head",),
    scales: str = "F16",
) -> float:
    """Bits per quantized weight that an artefact will have: what `true_bits` then counts, exactly.

    Args:
        shapes: Linears of the decoder layers -> (out, in).
        recipe: What happens to each of them.
        layout: One of `backend.formats.layouts.LAYOUTS`.
        keep: With an `AdditiveScheme`: Linears whose name contains one of these stay in 16 bits; a recipe has its own.
        scales: safetensors' name of the scales' type.

    Raises:
        ConfigError: If nothing would be quantized.
    """
    weights = nbytes = 0
    for name, shape in shapes.items():
        scheme = _scheme(name, shape, recipe, layout, keep)
        if scheme is not None:
            weights += prod(shape)
            nbytes += sum(map(_nbytes, linear_tensors(layout, name, scheme, shape, scales)))
    if not weights:
        raise ConfigError(f"none of the {len(shapes)} Linears would be quantized; there are no bits to count")
    return 8 * nbytes / weights


def predicted_modelopt_bits(
    headers: Iterable[TensorInfo],
    scheme: ModeloptScheme,
    *,
    keep: tuple[str, ...] = ("lm_head",),
    dtype: str = "float16",
) -> float:
    """As `predicted_bits`, for what modelopt exports; factors of inputs that are stored beside a weight count too.

    Args:
        headers: `read_headers` of the 16-bit model.
        scheme: Of all Linears of the decoder layers.
        keep: Linears whose name contains one of these stay in 16 bits.
        dtype: The 16-bit type.

    Raises:
        ConfigError: If nothing would be quantized.
    """
    shapes = {tensor.name: tensor.shape for tensor in headers}
    inner, factors = folded(shapes), DTYPES[dtype]
    made = {n.removesuffix(".weight"): shape for n, shape in shapes.items() if is_quantized_linear(n, shape, keep)}
    if not made:
        raise ConfigError(f"none of the {len(shapes)} tensors would be quantized; there are no bits to count")
    nbytes = sum(_nbytes(stored) for name in made for stored in scheme.tensors(name, made[name], factors, inner))
    return 8 * nbytes / sum(map(prod, made.values()))


def _scheme(
    name: str, shape: tuple[int, int], recipe: AdditiveScheme | Recipe, layout: str, keep: tuple[str, ...]
) -> AdditiveScheme | Scheme | None:
    if isinstance(recipe, AdditiveScheme):
        kept = any(part in name for part in keep) or refusal(layout, recipe, shape)
        return None if kept else recipe
    scheme = recipe.scheme_for(name, shape[1])
    return None if isinstance(scheme, str) or refusal(layout, scheme, shape, recipe.scheme.group_size) else scheme


def _nbytes(stored: Stored) -> int:
    name, dtype, shape = stored
    return DTYPE_BYTES[dtype] * prod(shape) if _stands_for_weight(name.rpartition(".")[2]) else 0


def _stands_for_weight(part: str) -> bool:
    return part not in NO_WEIGHT and not part.startswith(NO_WEIGHT_PREFIXES)


def _quantized_weights(folder: Path, prefix: str, parts: Mapping[str, TensorInfo]) -> int:
    """How many weights a module has that is a quantized Linear; 0 if it is none."""
    for mark, count in _COUNTS.items():
        if mark in parts:
            try:
                return count(folder, parts)
            except (KeyError, IndexError, OSError, SafetensorError) as error:
                raise CheckpointError(f"{folder}: {prefix} has no usable {error}; make the checkpoint again.") from None
    return 0


def _of_codes(folder: Path, parts: Mapping[str, TensorInfo]) -> int:
    return prod(parts["codes"].shape[:2]) * parts["codebooks"].shape[3]


def _of_qweight(folder: Path, parts: Mapping[str, TensorInfo]) -> int:
    return prod(parts["qweight"].shape) * PACK


def _of_packed(folder: Path, parts: Mapping[str, TensorInfo]) -> int:
    packed = parts["weight_packed"]
    if packed.dtype == "U8":  # two FP4 values in a byte
        return prod(packed.shape) * 2
    shape = parts["weight_shape"]
    with safe_open(str(folder / shape.file), framework="numpy") as file:
        return prod(int(n) for n in file.get_tensor(shape.name))


def _of_scaled(folder: Path, parts: Mapping[str, TensorInfo]) -> int:
    weight = parts["weight"]
    if weight.dtype in FLOATING:
        return 0
    return prod(weight.shape) * (2 if weight.dtype == "U8" else 1)  # modelopt's pairs of 4 bits; FP8 or int8


_COUNTS: Mapping[str, Callable[[Path, Mapping[str, TensorInfo]], int]] = {
    "codes": _of_codes,
    "qweight": _of_qweight,
    "weight_packed": _of_packed,
    "weight_scale": _of_scaled,
}
"""Part that marks a quantized Linear -> how many weights it has."""
