"""The checkpoint layouts we write: which Linears each can hold, and which tensors it stores. Imports no torch.

| layout             | bits       | groups                          | per checkpoint    |
|--------------------|------------|---------------------------------|-------------------|
| autoawq-gemm       | 4          | 32, 64, 128; out a multiple of 8 | one group size    |
| autoawq-gemv       | 4          | 32, 64, 128; out a multiple of 8 | one group size    |
| compressed-tensors | 2, 3, 4, 8 | 32, 64, 128, whole rows         | any mixture       |
| aqlm               | codebooks  | any that divides the inputs     | one scheme        |
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from backend.errors import ConfigError
from backend.formats.headers import TensorInfo
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import PER_CHANNEL, Scheme

AUTOAWQ_GEMM, AUTOAWQ_GEMV, COMPRESSED_TENSORS, AQLM = LAYOUTS = (
    "autoawq-gemm",
    "autoawq-gemv",
    "compressed-tensors",
    "aqlm",
)
DTYPES = {"float16": "F16", "bfloat16": "BF16"}
"""Types of the unquantized tensors that a job may ask for -> safetensors' names."""
FLOATING = ("F64", "F32", "F16", "BF16")
PACK = 8  # 4-bit values in a 32-bit word
WORD_BITS = 32

Stored = tuple[str, str, tuple[int, ...]]  # name, safetensors dtype, shape


def check_layout(layout: str, dtype: str | None) -> None:
    """Refuse names that no writer knows.

    Raises:
        ConfigError: For the layout or the dtype.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"found {layout!r}; allowed are {', '.join(LAYOUTS)}", key="layout", value=layout)
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"found {dtype!r}; allowed are {', '.join(DTYPES)}", key="dtype", value=dtype)


def stored_dtype(source: str, dtype: str | None) -> str:
    """Name, as safetensors has it, of the type in which an unquantized tensor is stored; None keeps the source's."""
    return DTYPES[dtype] if dtype and source in FLOATING else source


def scale_dtype(layout: str, dtype: str | None, source: Iterable[TensorInfo]) -> str:
    """Name, as safetensors has it, of the scales' type, `F16` or `BF16`.

    AutoAWQ's kernels read float16. Readers of compressed-tensors cast the scales to the model's type, so they get
    that type: what is evaluated is then what is run. A float32 model gets float16, which float32 holds exactly.

    Args:
        layout: One of `LAYOUTS`.
        dtype: The type asked for; None: that of most of the source's bytes.
        source: Headers of the 16-bit model.
    """
    if layout != COMPRESSED_TENSORS:
        return "F16"
    if dtype is not None:
        return DTYPES[dtype]
    count: Counter[str] = Counter()
    for tensor in source:
        count[tensor.dtype] += tensor.nbytes
    return "BF16" if count and count.most_common(1)[0][0] == "BF16" else "F16"


def refusal(
    layout: str, scheme: Scheme | AdditiveScheme, shape: tuple[int, int], group_size: int | None = None
) -> str | None:
    """Why a layout cannot hold a Linear quantized in this way; None if it can.

    Args:
        layout: One of `LAYOUTS`.
        scheme: How the Linear is to be quantized.
        shape: Of its weight, (out, in).
        group_size: The group size that an AutoAWQ checkpoint already has.
    """
    if isinstance(scheme, AdditiveScheme):
        return scheme.misfit(*shape) if layout == AQLM else f"the {layout} layout holds no codebooks"
    if layout == AQLM:
        return f"the {layout} layout holds codebooks, not {scheme.label}"
    if layout == COMPRESSED_TENSORS:
        return None
    if scheme.bits != 4:
        return f"the {layout} layout holds 4 bits, not {scheme.bits}"
    if scheme.group_size == PER_CHANNEL:
        return f"the {layout} layout holds groups of 32, 64 or 128, not whole rows"
    if group_size is not None and scheme.group_size != group_size:
        return f"the {layout} layout holds one group size, here {group_size}, and this Linear has {scheme.group_size}"
    if shape[0] % PACK:
        return f"its {shape[0]} outputs are no multiple of {PACK}, which the {layout} layout needs"
    return None


def linear_tensors(
    layout: str, prefix: str, scheme: Scheme | AdditiveScheme, shape: tuple[int, ...], scales: str
) -> list[Stored]:
    """The tensors, in order, that stand for the weight of one quantized Linear.

    Args:
        layout: One of `LAYOUTS`, one that holds the scheme.
        prefix: Name of the Linear.
        scheme: How it is quantized.
        shape: Of its weight, (out, in).
        scales: safetensors' name of the scales' type.
    """
    out, width = shape
    if isinstance(scheme, AdditiveScheme):
        K, G = scheme.num_codebooks, scheme.in_group_size  # noqa: N806
        return [
            (f"{prefix}.codes", f"I{scheme.code_bits}", (out, width // G, K)),
            (f"{prefix}.codebooks", scales, (K, scheme.words, 1, G)),
            (f"{prefix}.scales", scales, (out, 1, 1, 1)),
        ]
    group_size = width if scheme.group_size == PER_CHANNEL else scheme.group_size
    groups = width // group_size
    if layout == COMPRESSED_TENSORS:
        tensors: list[Stored] = [
            ("weight_packed", "I32", (out, words(width, scheme.bits))),
            ("weight_scale", scales, (out, groups)),
            ("weight_shape", "I64", (2,)),
        ]
        if not scheme.symmetric:
            tensors.append(("weight_zero_point", "I32", (words(out, scheme.bits), groups)))
    elif layout == AUTOAWQ_GEMM:
        tensors = [
            ("qweight", "I32", (width, out // PACK)),
            ("qzeros", "I32", (groups, out // PACK)),
            ("scales", scales, (groups, out)),
        ]
    else:
        padded = zeros_words(groups, group_size)
        tensors = [
            ("qweight", "I32", (out, width // PACK)),
            ("qzeros", "I32", (out, padded)),
            ("scales", scales, (out, padded * PACK)),
        ]
    return [(f"{prefix}.{part}", dtype, sizes) for part, dtype, sizes in tensors]


def words(count: int, bits: int) -> int:
    """32-bit words of `count` codes packed without gaps."""
    return -(-count * bits // WORD_BITS)


def zeros_words(groups: int, group_size: int) -> int:
    """Words per row of GEMV's `qzeros`: the kernels read them in blocks that depend on the group size."""
    multiple = {64: 2, 32: 4}.get(group_size, 1)
    base = -(-groups // PACK)
    return -(-base // multiple) * multiple
