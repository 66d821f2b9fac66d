"""What the AutoAWQ package cannot do, said before it starts. Imports no torch.

The package finds most of these out after its first layer's search, minutes into the job, and often with an empty
message. The limits are those of its sources, version 0.2.9.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from backend.errors import ConfigError
from backend.formats.headers import TensorInfo
from backend.formats.size import is_layer_linear

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2")
"""Values of config.json's `model_type` that the package quantizes and others can load; each is tested."""
BITS = (4,)
GROUP_SIZES = (32, 64, 128)
VERSIONS = ("GEMM", "GEMV")
GEMM_OUTPUTS = 32  # its packing loop drops what is beyond the last multiple
GEMV_OUTPUTS = 8
CLIP_OUTPUTS = 64  # rows per step of its clip search
UNCLIPPED = ("q_", "k_", "query", "key", "Wqkv")  # Linears left out of the clip search, by a part of their name
NATIVE = "ENGINE: native"


def autoawq_problems(
    headers: Iterable[TensorInfo], settings: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> list[ConfigError]:
    """Why the package cannot quantize a model with these settings.

    Args:
        headers: `read_headers` of the 16-bit model.
        settings: The YAML section: `W_BIT`, `Q_GROUP_SIZE` (one value or a list each), `ZERO_POINT`, `VERSION`.
        config: The model's config.json, to check its architecture too.

    Returns:
        One error per problem, each with its key; empty if it can.
    """
    problems = [
        *_not_among("W_BIT", settings["W_BIT"], BITS),
        *_not_among("Q_GROUP_SIZE", settings["Q_GROUP_SIZE"], GROUP_SIZES),
        *_not_among("ZERO_POINT", settings["ZERO_POINT"], (True,)),
        *_not_among("VERSION", settings["VERSION"], VERSIONS),
    ]
    if config is not None and config.get("model_type") not in MODEL_TYPES:
        found = config.get("model_type")
        message = f"the autoawq package is used for {', '.join(MODEL_TYPES)} models; this one is {found}. Use {NATIVE}."
        problems.append(ConfigError(message, key="ENGINE", value="autoawq"))
    return problems or _width_problems(headers, _each(settings["Q_GROUP_SIZE"]), settings["VERSION"])


def _not_among(key: str, values: Any, allowed: tuple[Any, ...]) -> Iterator[ConfigError]:
    known = ", ".join(map(str, allowed))
    for value in _each(values):
        if value not in allowed or type(value) is not type(allowed[0]):
            yield ConfigError(
                f"found {value!r}; the autoawq package takes {known}. Use {NATIVE}.", key=key, value=value
            )


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _width_problems(headers: Iterable[TensorInfo], groups: tuple[int, ...], version: str) -> list[ConfigError]:
    """At most one problem per key and kind: the first Linear that shows it."""
    found: dict[tuple[str, int], ConfigError] = {}
    for tensor in headers:
        if not is_layer_linear(tensor.name, tensor.shape):
            continue
        name = tensor.name.removesuffix(".weight")
        out, width = tensor.shape
        for group in groups:
            if width % group:
                message = (
                    f"group size {group} does not divide the {width} inputs of {name}, and the autoawq package cannot "
                    f"leave a layer out. Use a group size that divides all widths, or {NATIVE}."
                )
                found.setdefault(("Q_GROUP_SIZE", group), ConfigError(message, key="Q_GROUP_SIZE", value=group))
        needed = GEMM_OUTPUTS if version == "GEMM" else GEMV_OUTPUTS
        if not any(part in name for part in UNCLIPPED):
            needed = CLIP_OUTPUTS
        if out % needed:
            message = f"the autoawq package needs a multiple of {needed} outputs; {name} has {out}. Use {NATIVE}."
            found.setdefault(("ENGINE", needed), ConfigError(message, key="ENGINE", value="autoawq"))
    return list(found.values())
