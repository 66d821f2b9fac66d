"""What a job makes: one `Configuration` per result, the product of the lists in its algorithm's section.

Imports no torch: pages and checks before the start read configurations too.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from pydantic import ValidationError

from backend.engines.aqlm_plan import aqlm_requests
from backend.engines.modelopt_plan import modelopt_requests
from backend.engines.registry import NATIVE, engine_name
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import PER_CHANNEL, Override, Recipe, Scheme
from backend.schema import (
    AQLMSettings,
    AutoAWQSettings,
    JobConfig,
    LLMCompressorSettings,
    NativeSettings,
    OverrideSettings,
    TensorRTLLMSettings,
)
from backend.schema.fields import each

HEAD = "lm_head"  # outside the decoder layers, so the core leaves it alone; named so that reports say why


@dataclass(frozen=True)
class Configuration:
    """One result of a job.

    Attributes:
        name: Unique in the job and safe as a file name, e.g. `gptq-w4-g128`.
        label: For people, e.g. `GPTQ 4 bit, groups of 128`.
        engine: Name of the engine that makes it.
        request: What the engine's program is asked for, as JSON values. Native: `name`, `label`, `recipe`, `layout`,
            `dtype`; AQLM and modelopt: as `backend.engines.aqlm_plan` and `modelopt_plan` tell; the others: `name`,
            `label` and the section of the file as `settings`.
        folder: Where its model is published, below the job's folder; None: there itself if it is the only one, else
            in a folder of its name.
    """

    name: str
    label: str
    engine: str
    request: dict[str, Any]
    folder: str | None = None

    @property
    def recipe(self) -> Recipe | None:
        """What happens to which Linear, where Quantdeck's own core makes it."""
        return Recipe.from_dict(self.request["recipe"]) if "recipe" in self.request else None

    @property
    def additive(self) -> AdditiveScheme | None:
        """The codebooks of every Linear, where it has them."""
        return AdditiveScheme(**self.request["scheme"]) if "scheme" in self.request else None


def configurations(config: JobConfig, device: str = "cpu") -> list[Configuration]:
    """The results of a job; lists are taken in the order of the file, method first, then bits, then group size.

    Args:
        config: The job.
        device: Where it runs, which decides on what AQLM's section leaves open.
    """
    return _PLANS[type(config.algorithm_settings)](config.algorithm_settings, engine_name(config), device)


def by_the_core(config: JobConfig, device: str = "cpu") -> list[Configuration]:
    """What Quantdeck's own core would make of the same settings, whichever engine they ask for.

    The packages store the same tensors, so these recipes tell the size of their results too.

    Returns:
        As `configurations`; empty if the core cannot do what the settings ask for.
    """
    if engine_name(config) == NATIVE:
        return configurations(config, device)
    settings = config.algorithm_settings
    try:
        section = type(settings)(**{**settings.model_dump(), "ENGINE": NATIVE})
    except ValidationError:
        return []
    sections = config.llm.model_copy(update={config.ALGORITHM: section})
    return configurations(config.model_copy(update={"llm": sections}), device)


def scheme_label(scheme: Scheme) -> str:
    """A scheme for people, e.g. `AWQ 3 bit, groups of 64, symmetric`."""
    groups = "one group per row" if scheme.group_size == PER_CHANNEL else f"groups of {scheme.group_size}"
    return f"{scheme.method} {scheme.bits} bit, {groups}" + (", symmetric" if scheme.symmetric else "")


def _of_native(settings: NativeSettings, engine: str, device: str) -> list[Configuration]:
    return [_native(recipe, settings.layout, settings.stored_dtype) for recipe in _native_recipes(settings)]


def _of_llmcompressor(settings: LLMCompressorSettings, engine: str, device: str) -> list[Configuration]:
    if engine == NATIVE:
        return [_native(_llmcompressor_recipe(settings), "compressed-tensors", settings.dtype)]
    return [_packaged(settings.label, _llmcompressor_label(settings), engine, settings.model_dump())]


def _of_autoawq(settings: AutoAWQSettings, engine: str, device: str) -> list[Configuration]:
    if engine == NATIVE:
        return [_native(Recipe(s.label, s), settings.layout, settings.dtype) for s in _awq_schemes(settings)]
    (scheme,) = _awq_schemes(settings)
    section = {**settings.model_dump(), "W_BIT": scheme.bits, "Q_GROUP_SIZE": scheme.group_size}
    return [_packaged(scheme.label, scheme_label(scheme), engine, section)]


def _of_aqlm(settings: AQLMSettings, engine: str, device: str) -> list[Configuration]:
    return [
        Configuration(name, request["label"], engine, request, folder)
        for name, folder, request in aqlm_requests(settings, device)
    ]


def _of_tensorrtllm(settings: TensorRTLLMSettings, engine: str, device: str) -> list[Configuration]:
    return [Configuration(one["name"], one["label"], engine, one) for one in modelopt_requests(settings)]


_PLANS: dict[type, Callable[[Any, str, str], list[Configuration]]] = {
    NativeSettings: _of_native,
    LLMCompressorSettings: _of_llmcompressor,
    AutoAWQSettings: _of_autoawq,
    AQLMSettings: _of_aqlm,
    TensorRTLLMSettings: _of_tensorrtllm,
}
"""From an algorithm's settings, its engine and its device to the results."""


def _native(recipe: Recipe, layout: str, dtype: str | None) -> Configuration:
    label = scheme_label(recipe.scheme)
    request = {
        "name": recipe.name,
        "label": label,
        "recipe": recipe.to_dict(),
        "layout": layout,
        "dtype": dtype,
    }
    return Configuration(recipe.name, label, NATIVE, request)


def _packaged(name: str, label: str, engine: str, settings: dict[str, Any]) -> Configuration:
    return Configuration(name, label, engine, {"name": name, "label": label, "settings": settings})


def _awq_schemes(settings: AutoAWQSettings) -> list[Scheme]:
    pairs = product(each(settings.W_BIT), each(settings.Q_GROUP_SIZE))
    return [Scheme("AWQ", bits, group_size, not settings.ZERO_POINT) for bits, group_size in pairs]


def _native_recipes(settings: NativeSettings) -> list[Recipe]:
    lists = product(each(settings.METHOD), each(settings.W_BIT), each(settings.Q_GROUP_SIZE))
    schemes = [Scheme(method, bits, group_size, settings.SYMMETRIC) for method, bits, group_size in lists]
    return [
        Recipe(
            name=scheme.label,
            scheme=scheme,
            overrides=_overrides(settings.OVERRIDES, scheme),
            keep=tuple(settings.KEEP),
            misfit=settings.MISFIT,
            act_order=settings.ACT_ORDER,
            damp=settings.DAMP,
            correct=settings.CORRECT,
            refine=settings.REFINE,
        )
        for scheme in schemes
    ]


def _overrides(rows: Sequence[OverrideSettings], scheme: Scheme) -> tuple[Override, ...]:
    """Exceptions with what they leave out filled in from the scheme."""

    def changed(row: OverrideSettings) -> Scheme | None:
        if row.KEEP:
            return None
        return Scheme(
            row.METHOD or scheme.method,
            row.W_BIT or scheme.bits,
            row.Q_GROUP_SIZE or scheme.group_size,
            scheme.symmetric if row.SYMMETRIC is None else row.SYMMETRIC,
        )

    return tuple(Override(row.PATTERN, changed(row)) for row in rows)


def _llmcompressor_recipe(settings: LLMCompressorSettings) -> Recipe:
    """The core's recipe for the same checkpoint; IGNORE names modules in full, so each becomes an exact pattern."""
    weights = settings.weights
    scheme = Scheme(settings.RECIPE, weights.bits, settings.group_size, weights.symmetric)
    ignored = [name for name in settings.IGNORE if name != HEAD]
    return Recipe(
        name=settings.label,
        scheme=scheme,
        overrides=tuple(Override(glob.escape(name), None) for name in ignored),
        keep=(HEAD,),
        act_order=settings.ACTORDER == "static",
        damp=settings.DAMPENING_FRAC,
    )


def _llmcompressor_label(settings: LLMCompressorSettings) -> str:
    weights = settings.weights
    words = settings.RECIPE if weights.bits == 16 else f"{settings.RECIPE} {settings.SCHEME}"
    if weights.weight_only:
        groups = "one group per row" if settings.group_size == PER_CHANNEL else f"groups of {settings.group_size}"
        words = f"{words}, {groups}"
    if "MASK" in settings.facts.uses:
        words = f"{words}, {settings.SPARSITY:.0%} zeros ({settings.MASK})"
    return f"{words}, 8-bit KV cache" if settings.KV_CACHE_FP8 and settings.RECIPE != "KVCache" else words
