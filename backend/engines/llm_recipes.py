"""From the settings of `llm: LLMCompressor:` to llm-compressor's modifiers. Imports llm-compressor when called."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from backend.schema.llm_tables import PER_CHANNEL
from backend.schema.llmcompressor import LLMCompressorSettings

if TYPE_CHECKING:
    from torch import nn

Modifiers = list[Any]


def modifiers(settings: LLMCompressorSettings, model: nn.Module) -> Modifiers:
    """The recipe as `oneshot` takes it: modifiers in the order in which they run, for this model."""
    return _BUILDERS[settings.RECIPE](settings, model)


def targeted(settings: LLMCompressorSettings, model: nn.Module) -> list[str]:
    """Names of the Linears that TARGETS and IGNORE leave to be compressed, in the order of the model."""
    from compressed_tensors.utils import match_named_modules
    from torch import nn

    found = match_named_modules(model, settings.TARGETS, settings.IGNORE)
    return [name for name, module in found if isinstance(module, nn.Linear)]


def _scheme(settings: LLMCompressorSettings) -> dict[str, Any]:
    """What every quantizing modifier is told: the preset by name, or the preset with another group size."""
    if not settings.has_own_group_size:
        return settings.modifier
    from compressed_tensors.quantization import preset_name_to_scheme

    preset = preset_name_to_scheme(settings.SCHEME, settings.TARGETS)
    weights = preset.weights.model_dump()
    if settings.GROUP_SIZE == PER_CHANNEL:
        weights.update(strategy="channel", group_size=None)
    else:
        weights.update(strategy="group", group_size=settings.GROUP_SIZE)
    return {**settings.modifier, "config_groups": {"group_0": {"targets": settings.TARGETS, "weights": weights}}}


def _gptq(settings: LLMCompressorSettings) -> Modifiers:
    from llmcompressor.modifiers.gptq import GPTQModifier

    order = None if settings.ACTORDER == "none" else settings.ACTORDER
    return [GPTQModifier(dampening_frac=settings.DAMPENING_FRAC, actorder=order, **_scheme(settings))]


def _rtn(settings: LLMCompressorSettings) -> Modifiers:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    return [QuantizationModifier(**_scheme(settings))]


def _awq() -> Modifiers:
    from llmcompressor.modifiers.transform import AWQModifier

    return [AWQModifier()]


def _smooth(settings: LLMCompressorSettings) -> Modifiers:
    from llmcompressor.modifiers.transform import SmoothQuantModifier

    return [SmoothQuantModifier(smoothing_strength=settings.SMOOTHING_STRENGTH)]


def _pruning(settings: LLMCompressorSettings, model: nn.Module) -> dict[str, Any]:
    # The pruning modifiers look for IGNORE below each target ("lm_head." where the target is lm_head itself) and so
    # would prune the head all the same; with the exact names there is nothing left to ignore.
    return {
        "sparsity": settings.SPARSITY,
        "mask_structure": "2:4" if settings.MASK == "2:4" else "0:0",
        "targets": targeted(settings, model),
        "ignore": [],
    }


def _sparsegpt(settings: LLMCompressorSettings, model: nn.Module) -> Modifiers:
    from llmcompressor.modifiers.pruning import SparseGPTModifier

    return [SparseGPTModifier(dampening_frac=settings.DAMPENING_FRAC, **_pruning(settings, model))]


def _wanda(settings: LLMCompressorSettings, model: nn.Module) -> Modifiers:
    from llmcompressor.modifiers.pruning import WandaPruningModifier

    return [WandaPruningModifier(**_pruning(settings, model))]


def _autoround(settings: LLMCompressorSettings) -> Modifiers:
    from llmcompressor.modifiers.autoround import AutoRoundModifier

    return [AutoRoundModifier(iters=settings.AUTOROUND_ITERS, enable_torch_compile=False, **_scheme(settings))]


def _spinquant(model: Any) -> Modifiers:
    from llmcompressor.modifiers.transform import SpinQuantModifier

    # R1 and R2 are fused into the weights. Sylvester's matrices exist for powers of two only.
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    powers = all(size & (size - 1) == 0 for size in (config.hidden_size, head_dim))
    return [SpinQuantModifier(transform_type="hadamard" if powers else "random-hadamard")]


_BUILDERS: dict[str, Callable[[LLMCompressorSettings, Any], Modifiers]] = {
    "GPTQ": lambda s, _: _gptq(s),
    "RTN": lambda s, _: _rtn(s),
    "AWQ": lambda s, _: [*_awq(), *_rtn(s)],
    "AWQ+GPTQ": lambda s, _: [*_awq(), *_gptq(s)],
    "SmoothQuant+GPTQ": lambda s, _: [*_smooth(s), *_gptq(s)],
    "SparseGPT": _sparsegpt,
    "Wanda": _wanda,
    "SparseGPT+RTN": lambda s, model: [*_sparsegpt(s, model), *_rtn(s)],
    "AutoRound": lambda s, _: _autoround(s),
    "SpinQuant+RTN": lambda s, model: [*_spinquant(model), *_rtn(s)],
    "KVCache": lambda s, _: _rtn(s),
}
