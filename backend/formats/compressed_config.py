"""`quantization_config` of compressed-tensors checkpoints: the one we write, and what we can read of others'."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from backend.quantize.recipe import PER_CHANNEL

METHOD = "compressed-tensors"
PACK_QUANTIZED = "pack-quantized"
VERSION = "0.19.0"
"""The release of compressed-tensors whose layout and keys these are."""
STRATEGIES = ("group", "channel")


@dataclass(frozen=True)
class LinearFormat:
    """How one Linear was quantized, as far as its tensors tell.

    Attributes:
        bits: Bits per code.
        symmetric: No zeros are stored.
        width: Inputs.
        groups: Groups per row.
    """

    bits: int
    symmetric: bool
    width: int
    groups: int


def quantization_config(linears: Mapping[str, LinearFormat], ignore: Sequence[str]) -> dict[str, Any]:
    """What transformers and vLLM need to know.

    A single scheme targets every Linear that is not ignored. Of several, each names its Linears in full: loaders that
    fuse projections would let the class name win over a name.

    Args:
        linears: The quantized Linears.
        ignore: Names of those that stay in 16 bits, in and outside of the decoder layers.
    """
    members: dict[tuple[int, int, bool], list[str]] = {}
    for name, linear in linears.items():
        members.setdefault((linear.bits, _group_size(linear, linears.values()), linear.symmetric), []).append(name)
    groups = {
        f"group_{index}": _group(*scheme, targets=["Linear"] if len(members) == 1 else names)
        for index, (scheme, names) in enumerate(members.items())
    }
    return {
        "config_groups": groups,
        "format": PACK_QUANTIZED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": VERSION,
    }


def _group_size(linear: LinearFormat, others: Iterable[LinearFormat]) -> int:
    """A row that is one group may be either: it joins the groups of its width if there are any."""
    if linear.groups > 1:
        return linear.width // linear.groups
    same = (o for o in others if o.groups > 1 and (o.bits, o.symmetric) == (linear.bits, linear.symmetric))
    return linear.width if any(o.width // o.groups == linear.width for o in same) else PER_CHANNEL


def _group(bits: int, group_size: int, symmetric: bool, *, targets: list[str]) -> dict[str, Any]:
    per_channel = group_size == PER_CHANNEL
    return {
        "format": PACK_QUANTIZED,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": None if per_channel else group_size,
            "num_bits": bits,
            "observer": None,
            "observer_kwargs": {},
            "strategy": "channel" if per_channel else "group",
            "symmetric": symmetric,
            "type": "int",
        },
    }


@dataclass(frozen=True)
class WeightScheme:
    """One config group of packed integer weights.

    Attributes:
        targets: Names, `re:` patterns and class names of its modules.
        bits: Bits per code.
        group_size: Inputs per group; -1: all of a row.
    """

    targets: tuple[str, ...]
    bits: int
    group_size: int


def packed_schemes(config: Mapping[str, Any]) -> list[WeightScheme] | None:
    """The config groups, if they are packed integer weights and nothing else; None: other code has to load them."""
    groups = config.get("config_groups")
    extras = ("kv_cache_scheme", "transform_config", "sparsity_config")
    if not isinstance(groups, Mapping) or not groups or any(config.get(key) for key in extras):
        return None
    schemes = [_packed_scheme(group, config.get("format")) for group in groups.values()]
    found = [scheme for scheme in schemes if scheme is not None]
    return found if len(found) == len(schemes) else None


def _packed_scheme(group: Any, default_format: Any) -> WeightScheme | None:
    if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
        return None
    weights: Mapping[str, Any] = group["weights"]
    targets: Any = group.get("targets")
    bits: Any = weights.get("num_bits")
    size: Any = weights.get("group_size")
    strategy = weights.get("strategy")
    strategy = strategy or ("group" if size and size > 0 else "channel" if size == PER_CHANNEL else None)
    readable = (
        (group.get("format") or default_format) == PACK_QUANTIZED
        and not group.get("input_activations")
        and not group.get("output_activations")
        and weights.get("type", "int") == "int"
        and strategy in STRATEGIES
        and isinstance(bits, int)
        and 1 <= bits <= 8
        and (strategy == "channel" or (isinstance(size, int) and size > 0))
        and isinstance(targets, list)
        and all(isinstance(target, str) for target in targets)
    )
    return WeightScheme(tuple(targets), bits, PER_CHANNEL if strategy == "channel" else size) if readable else None


def scheme_of(name: str, schemes: Sequence[WeightScheme]) -> WeightScheme | None:
    """The scheme of a Linear: by its name, else by a pattern, else by its class; the order that the library uses."""
    ways = (
        lambda target: target == name,
        lambda target: target.startswith("re:") and re.match(target.removeprefix("re:"), name) is not None,
        lambda target: target == "Linear",
    )
    for way in ways:
        for scheme in schemes:
            if any(way(target) for target in scheme.targets):
                return scheme
    return None
