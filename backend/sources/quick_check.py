"""What can be said about a model in milliseconds, from config.json and the safetensors headers alone.

Pages check while somebody types, so this imports no torch. `backend.quantize.check` compares every tensor with
the module tree of transformers; a job does that first of all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, ModelError
from backend.formats.config import EXPERT_KEYS, read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.formats.layouts import refusal
from backend.formats.size import LAYER, drop_tied_head, is_layer_linear
from backend.quantize.recipe import GROUP_SIZES, PER_CHANNEL, Recipe

CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
SUPPORTED = (
    "Supported are dense decoder-only models like Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, Phi-3, OPT and GPT-NeoX"
)


@dataclass(frozen=True)
class QuickFacts:
    """A model that can be quantized.

    Attributes:
        config: Its config.json.
        headers: Every tensor, without a copy of tied embeddings.
        linears: Names of the Linears of its decoder layers and their weights' (out, in).
        weight_bytes: Of all tensors, copies included.
    """

    config: dict[str, Any]
    headers: list[TensorInfo]
    linears: dict[str, tuple[int, int]]
    weight_bytes: int = 0


def quick_check(folder: Path, *, remote_code: bool = False) -> QuickFacts:
    """Refuse a model that cannot be quantized.

    Args:
        folder: The model.
        remote_code: Whether its job may run code that comes with it; here none is run.

    Raises:
        ModelError: If it is quantized already, or of an architecture that is not supported.
        CheckpointError: If weight files are missing, truncated, corrupt or pickles.
    """
    config = read_config_json(folder, remote_code=remote_code)
    check_config(str(folder), config)
    return check_tensors(str(folder), config, read_headers(folder))


def check_config(model: str, config: Mapping[str, Any]) -> None:
    """Refuse a model for what its config.json says; part of one, as a list of models has it, is enough.

    Raises:
        ModelError: If it is quantized already, or of an architecture that is not supported.
    """
    name = _architecture(config)
    if config.get("quantization_config"):
        raise ModelError(f"{model} is quantized already; give the 16-bit model it was made from")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} cannot be quantized: it is an encoder-decoder model. {SUPPORTED}")
    for key in EXPERT_KEYS:
        if isinstance(config.get(key), int) and config[key] > 1:
            raise ModelError(
                f"{name} cannot be quantized: it is a mixture of experts ({key} = {config[key]}). {SUPPORTED}"
            )
    if config.get("model_type") in CONV1D_TYPES:
        raise ModelError(f"{name} cannot be quantized: its weights are Conv1D modules, not Linears. {SUPPORTED}")


def check_tensors(model: str, config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> QuickFacts:
    """Refuse a model for what its weights are, as its headers tell.

    Args:
        model: Its folder or name, for messages.
        config: Its config.json.
        tensors: Every tensor of its weight files.

    Raises:
        ModelError: If there are no Linears to quantize, or another number of layers than config.json says.
    """
    name = _architecture(config)
    headers = drop_tied_head(tensors, config)
    found = [t for t in headers if is_layer_linear(t.name, t.shape)]
    if not found:
        raise ModelError(
            f"{name} cannot be quantized: no Linear weights in numbered decoder layers were found. {SUPPORTED}"
        )
    layers = {int(match.group(1)) for t in found if (match := LAYER.search(t.name))}
    expected = config.get("num_hidden_layers")
    if isinstance(expected, int) and layers != set(range(expected)):
        raise ModelError(f"{model} holds the weights of {len(layers)} decoder layers; config.json says {expected}")
    linears = {t.name.removesuffix(".weight"): (t.shape[0], t.shape[1]) for t in found}
    return QuickFacts(dict(config), headers, linears, sum(t.nbytes for t in tensors))


def _architecture(config: Mapping[str, Any]) -> str:
    return str((config.get("architectures") or [config.get("model_type") or "this model"])[0])


def kept_linears(linears: Mapping[str, tuple[int, int]], recipe: Recipe, layout: str) -> dict[str, str]:
    """The Linears that a recipe leaves in 16 bits, and why.

    Args:
        linears: Name -> (out, in).
        recipe: What happens to each.
        layout: One of `backend.formats.layouts.LAYOUTS`.

    Raises:
        ConfigError: If it leaves all of them, or one of its exceptions is about none of them. The key is that of
            the YAML: `Q_GROUP_SIZE`, `KEEP`, `FORMAT` or `OVERRIDES.N.PATTERN`.
    """
    for number, override in enumerate(recipe.overrides):
        if not any(fnmatchcase(name, override.pattern) for name in linears):
            raise ConfigError(
                f"found {override.pattern!r}, which matches no Linear; this model has e.g. {next(iter(linears))}",
                key=f"OVERRIDES.{number}.PATTERN",
                value=override.pattern,
            )
    kept = {}
    for name, shape in linears.items():
        scheme = recipe.scheme_for(name, shape[1])
        reason = scheme if isinstance(scheme, str) else refusal(layout, scheme, shape, recipe.scheme.group_size)
        if reason:
            kept[name] = reason
    if len(kept) == len(linears):
        raise _nothing_left(linears, recipe, kept)
    return kept


def _nothing_left(linears: Mapping[str, tuple[int, int]], recipe: Recipe, kept: Mapping[str, str]) -> ConfigError:
    """Why a recipe quantizes nothing at all, at the key that has to change."""
    size = recipe.scheme.group_size
    widths = sorted({width for _, width in linears.values()})
    if size != PER_CHANNEL and all(width % size for width in widths):
        return ConfigError(
            f"found {size}, which does not divide the inputs of any Linear ({', '.join(map(str, widths))}), so nothing "
            f"would be quantized; {_fitting(widths)}",
            key="Q_GROUP_SIZE",
            value=size,
        )
    in_the_name = any(any(part in name for part in recipe.keep) for name in kept)
    reason = Counter(kept.values()).most_common(1)[0][0]
    return ConfigError(
        f"nothing would be quantized: all {len(linears)} Linears stay in 16 bits, e.g. {next(iter(kept))}, "
        f"since {reason}",
        key="KEEP" if in_the_name else "OVERRIDES" if None in [o.scheme for o in recipe.overrides] else "FORMAT",
    )


def _fitting(widths: Sequence[int]) -> str:
    for_all = [g for g in sorted(GROUP_SIZES, reverse=True) if all(width % g == 0 for width in widths)]
    if for_all:
        return f"use {_words(for_all)} to fit all of them"
    for_some = [g for g in sorted(GROUP_SIZES, reverse=True) if any(width % g == 0 for width in widths)]
    return f"use {_words(for_some)} to fit some of them" if for_some else "neither does 128, 64 or 32"


def _words(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def kept_note(kept: Mapping[str, str], total: int) -> str:
    """One sentence on the Linears that stay in 16 bits, e.g. `4 of 28 Linears stay in 16 bits: 4 since ...`."""
    reasons = Counter(kept.values())
    first = {reason: next(name for name, why in kept.items() if why == reason) for reason in reasons}
    parts = [f"{count} since {reason} (e.g. {first[reason]})" for reason, count in reasons.most_common()]
    return f"{len(kept)} of {total} Linears stay in 16 bits: {'; '.join(parts)}."
