"""What llm-compressor cannot do with a model, told before it loads one. Reads config.json and headers; no torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, ConfigErrors, ModelError
from backend.formats.config import EXPERT_KEYS, read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.formats.size import LAYER
from backend.schema.llm_tables import NO_SCHEME, PER_CHANNEL
from backend.schema.llmcompressor import LLMCompressorSettings

SECTION = "llm.LLMCompressor"
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
NOT_LINEAR = re.compile(r"(embed|embeddings?|wte|wpe|word_embeddings|norm|ln_f)\w*\.weight$")
HADAMARD_UP_TO = 256  # matrices of every order 4n up to this come with compressed-tensors; doubling gives the rest
CACHED = ("k_proj", "v_proj")
NORMS = ("input_layernorm", "post_attention_layernorm")
EXTRA_NORM = "pre_feedforward_layernorm"
NO_KV_HEADS = ("opt",)  # their configuration does not say how many heads the cache has


def check_llm(model_dir: Path, settings: LLMCompressorSettings | Mapping[str, Any]) -> None:
    """Refuse a model folder that llm-compressor cannot compress as asked.

    Raises:
        ModelError: If no recipe works on it.
        CheckpointError: If its files are missing or broken.
        ConfigErrors: If it does not go with these settings.
    """
    problems = llm_problems(read_headers(model_dir), settings, read_config_json(model_dir))
    if problems:
        raise ConfigErrors(problems)


def llm_problems(
    headers: Iterable[TensorInfo], settings: LLMCompressorSettings | Mapping[str, Any], config: Mapping[str, Any]
) -> list[ConfigError]:
    """What of the settings does not go with a model; empty if all does.

    Args:
        headers: `read_headers` of the model.
        settings: The YAML section.
        config: The model's config.json.

    Raises:
        ModelError: If no recipe works on the model.
    """
    chosen = settings if isinstance(settings, LLMCompressorSettings) else LLMCompressorSettings(**settings)
    _refuse_model(config)
    tensors = list(headers)
    linears = linear_widths(tensors)
    targets = {n: w for n, w in linears.items() if _matches(n, chosen.TARGETS) and not _matches(n, chosen.IGNORE)}
    if not targets and chosen.RECIPE != "KVCache":
        return [_no_target(chosen, linears)]
    problems = []
    if chosen.RECIPE == "AutoRound":
        problems += _outside_layers(chosen, [*linears, *(["lm_head"] if config.get("tie_word_embeddings") else [])])
    if misfit := _group_misfit(chosen, targets):
        problems.append(misfit)
    parts = {tensor.name.split(".")[-2] for tensor in tensors if tensor.name.count(".") > 1}
    if chosen.KV_CACHE_FP8 or chosen.RECIPE == "KVCache":
        problems += _cache_problems(chosen, parts, config)
    problems += _structure_problems(chosen.RECIPE, parts)
    if chosen.RECIPE == "SpinQuant+RTN":
        problems += _rotation_problems(config)
    return problems


def linear_widths(headers: Iterable[TensorInfo]) -> dict[str, int]:
    """Name of every Linear and the number of its inputs, as far as headers can tell."""
    return {
        tensor.name.removesuffix(".weight"): tensor.shape[1]
        for tensor in headers
        if tensor.name.endswith(".weight") and len(tensor.shape) == 2 and not NOT_LINEAR.search(tensor.name)
    }


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """As llm-compressor matches: a class, a full name, or `re:` and an expression from the name's start."""
    return any(re.match(p[3:], name) is not None if p.startswith("re:") else p in (name, "Linear") for p in patterns)


def _refuse_model(config: Mapping[str, Any]) -> None:
    name = (config.get("architectures") or [config.get("model_type") or "this model"])[0]
    if config.get("quantization_config"):
        raise ModelError(f"{name} is quantized already; give the 16-bit model it was made from")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} cannot be compressed: it is an encoder-decoder model; give a decoder-only model")
    if config.get("model_type") in CONV1D_TYPES:
        raise ModelError(
            f"{name} cannot be compressed: its weights are Conv1D modules, and llm-compressor finds only Linears; "
            "give a model made of Linears, like Llama, Mistral or Qwen"
        )
    for key in EXPERT_KEYS:
        if isinstance(config.get(key), int) and config[key] > 1:
            raise ModelError(
                f"{name} cannot be compressed: it is a mixture of experts ({key} = {config[key]}), whose calibration "
                "is not checked here; give a dense model"
            )


def _problem(key: str, value: object, message: str) -> ConfigError:
    return ConfigError(f"found {value!r}; {message}", key=f"{SECTION}.{key}", value=value)


def _no_target(settings: LLMCompressorSettings, linears: Mapping[str, int]) -> ConfigError:
    some = ", ".join(list(linears)[:2]) or "none"
    reached = any(_matches(name, settings.TARGETS) for name in linears)
    key = "IGNORE" if reached else "TARGETS"
    why = "that leaves no Linear to compress" if reached else "that matches no Linear of the model"
    return _problem(
        key, getattr(settings, key), f"{why}; its Linears are named like {some}. Write Linear, a full name, or re:..."
    )


def _group_misfit(settings: LLMCompressorSettings, targets: Mapping[str, int]) -> ConfigError | None:
    size = settings.group_size
    multiple = 4 if settings.SCHEME == NO_SCHEME and settings.MASK == "2:4" and "MASK" in settings.facts.uses else size
    if multiple in (0, PER_CHANNEL):
        return None
    misfits = [name for name, width in targets.items() if width % multiple]
    if not misfits:
        return None
    named = ", ".join(f"{name} ({targets[name]} inputs)" for name in misfits[:3])
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    if settings.weights.weight_only and settings.RECIPE in ("GPTQ", "RTN", "AWQ", "AWQ+GPTQ"):
        fitting = [str(g) for g in (64, 32) if g < size and all(w % g == 0 for w in targets.values())]
        advice = f"set GROUP_SIZE to {' or '.join([*fitting, '-1'])}, or add these to IGNORE"
        return _problem("GROUP_SIZE", settings.GROUP_SIZE or size, f"it does not divide {named}{more}; {advice}")
    key, value = ("MASK", settings.MASK) if settings.SCHEME == NO_SCHEME else ("SCHEME", settings.SCHEME)
    return _problem(
        key, value, f"its groups of {multiple} do not divide {named}{more}; add these to IGNORE, or choose another"
    )


def _outside_layers(settings: LLMCompressorSettings, linears: Iterable[str]) -> list[ConfigError]:
    """AutoRound learns decoder layers only, and stores scales that it never computed for anything else."""
    chosen = (n for n in linears if _matches(n, settings.TARGETS) and not _matches(n, settings.IGNORE))
    outside = [name for name in chosen if not LAYER.search(name)]
    if not outside:
        return []
    why = f"AutoRound quantizes decoder layers only; add {', '.join(outside)} to IGNORE, or use GPTQ"
    return [_problem("IGNORE", settings.IGNORE, why)]


def _cache_problems(
    settings: LLMCompressorSettings, parts: Collection[str], config: Mapping[str, Any]
) -> list[ConfigError]:
    missing = [part for part in CACHED if part not in parts]
    if not missing and config.get("model_type") not in NO_KV_HEADS:
        return []
    why = (
        f"the model has no {' and no '.join(missing)}"
        if missing
        else f"llm-compressor cannot do it for {config['model_type']}"
    )
    if settings.RECIPE == "KVCache":
        return [_problem("RECIPE", "KVCache", f"{why}, which an 8-bit cache needs; use another recipe")]
    return [_problem("KV_CACHE_FP8", True, f"{why}, which an 8-bit cache needs; set it to False")]


def _structure_problems(recipe: str, parts: Collection[str]) -> list[ConfigError]:
    """Recipes that move scales or rotations between modules find their partners by name.

    Where there is one norm more than they know (Gemma 2 and 3), SmoothQuant takes the wrong one without a word and
    the model comes out damaged; SpinQuant stops.
    """
    if recipe not in ("AWQ", "AWQ+GPTQ", "SmoothQuant+GPTQ", "SpinQuant+RTN"):
        return []
    needed = [*NORMS, *(("q_proj", "k_proj", "v_proj") if "SpinQuant" in recipe or "qkv_proj" not in parts else ())]
    missing = [part for part in needed if part not in parts]
    if missing:
        why = f"it needs modules named {', '.join(needed)}, and the model has no {' and no '.join(missing)}"
    elif EXTRA_NORM in parts and recipe in ("SmoothQuant+GPTQ", "SpinQuant+RTN"):
        why = f"it does not know what to do with the model's {EXTRA_NORM}, and would damage it"
    else:
        return []
    return [_problem("RECIPE", recipe, f"{why}; use GPTQ or RTN")]


def _rotation_problems(config: Mapping[str, Any]) -> list[ConfigError]:
    hidden = int(config.get("hidden_size") or 0)
    heads = int(config.get("num_attention_heads") or 1)
    problems = []
    for what, size in (("hidden size", hidden), ("head size", int(config.get("head_dim") or hidden // heads))):
        if not _has_hadamard(size):
            problems.append(
                _problem(
                    "RECIPE", "SpinQuant+RTN", f"no Hadamard rotation of the model's {what} {size} is known; use RTN"
                )
            )
    return problems


def _has_hadamard(size: int) -> bool:
    if size < 1:
        return False
    power = size & -size  # the largest power of two that divides it
    return size == power or (size % 4 == 0 and 4 * (size // power) <= HADAMARD_UP_TO)
