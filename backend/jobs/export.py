"""A job's settings in the forms that other people and programs use."""

from __future__ import annotations

import io
import re
import shlex
from collections.abc import Callable, Mapping
from fnmatch import translate
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from backend.engines.configurations import configurations
from backend.errors import ConfigError
from backend.quantize.recipe import PER_CHANNEL, Recipe, Scheme
from backend.schema import (
    SECTIONS,
    AQLMSettings,
    AutoAWQSettings,
    Document,
    JobConfig,
    LLMCompressorSettings,
    TensorRTLLMSettings,
    describe,
    parse_yaml,
    sections,
)
from backend.schema.document import PLACEHOLDER
from backend.schema.fields import each

TARGETS = ("yaml", "nyuntam", "llmcompressor", "command")
OWN_AWQ_KEYS = ("ENGINE", "FORMAT")
OWN_KEYS = ("REVISION", "TRUST_REMOTE_CODE", "PRIORITY", "MAX_ATTEMPTS", "TIME_LIMIT_HOURS")
ORIGINAL_METHODS = ("int4_awq", "fp8", "smoothquant", "int8")
HEAD = "lm_head"

Modifiers = dict[str, dict[str, Any]]


def export_text(config_yaml: str, target: str) -> str:
    """Write a job's settings for a target.

    Args:
        config_yaml: The job file.
        target: `yaml` (the file as it was submitted), `nyuntam` (without Quantdeck's own sections and keys, which the
            original system would take for algorithm arguments), `llmcompressor` (a recipe with the nearest
            equivalent) or `command` (a shell command that runs the same job).

    Raises:
        ConfigErrors: If the file is not valid.
        ConfigError: If the target cannot do what the job does, e.g. several results in one run.
    """
    document = parse_yaml(config_yaml)
    config = document.config
    if target == "yaml":
        return document.dump()
    if target == "command":
        return (
            f"cat > {shlex.quote(config.JOB_ID)}.yaml <<'YAML'\n{document.dump().rstrip()}\nYAML\n"
            f"python -m backend run {shlex.quote(config.JOB_ID)}.yaml\n"
        )
    if target == "nyuntam":
        return _nyuntam(document, config)
    stream = io.StringIO()
    YAML(typ="rt", pure=True).dump(_quoted({"quant_stage": {"quant_modifiers": _modifiers(config)}}), stream)
    return stream.getvalue()


def _quoted(value: Any) -> Any:
    """With quotes where readers of older YAML differ: bare, `2:4` is the number 124 to them, `re:(?!...)` an error."""
    if isinstance(value, dict):
        return {key: _quoted(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_quoted(item) for item in value]
    return DoubleQuotedScalarString(value) if isinstance(value, str) and ":" in value else value


def _nyuntam(document: Document, config: JobConfig) -> str:
    """The file without what is ours, as far as the original system can do the job."""
    prepare = _NYUNTAM.get(config.ALGORITHM)
    if prepare is None:
        raise ConfigError(
            f"found {config.ALGORITHM!r}, which the original system does not have; it has {' and '.join(_NYUNTAM)}",
            key="ALGORITHM",
            value=config.ALGORITHM,
        )
    prepare(document, config)
    for key in (*SECTIONS, *OWN_KEYS):
        document.remove((key,))
    return PLACEHOLDER.sub(r"\1# \2", document.dump())


def _nyuntam_awq(document: Document, config: JobConfig) -> None:
    """Its AutoAWQ makes one 4-bit result per file."""
    for key, allowed in (("W_BIT", "4"), ("Q_GROUP_SIZE", "one of 128, 64 and 32")):
        setting = getattr(config.algorithm_settings, key)
        values = each(setting)
        if len(values) > 1 or (key == "W_BIT" and values != (4,)):
            raise ConfigError(
                f"found {', '.join(map(str, values))}; the original system makes one result per file: "
                f"set it to {allowed}",
                key=f"llm.AutoAWQ.{key}",
                value=values,
            )
        if isinstance(setting, tuple):
            document.set(("llm", "AutoAWQ", key), values[0])
    for key in OWN_AWQ_KEYS:
        document.remove(("llm", "AutoAWQ", key))


def _nyuntam_aqlm(document: Document, config: JobConfig) -> None:
    """Its AQLM takes the calibration's size from its own section, and one text for all."""
    section = ("llm", "AQLM", "calibration_config")
    given = config.CALIBRATION.model_fields_set
    for key, name in (("SAMPLES", "nsamples"), ("SEQUENCE_LENGTH", "model_seqlen"), ("SEED", "seed")):
        if key in given:
            document.set((*section, name), getattr(config.CALIBRATION, key))
    for path, model in sections(AQLMSettings):
        for spec in describe(model):
            if spec.key.isupper():
                document.remove(("llm", "AQLM", *path, spec.key))
    document.remove(("llm", "AQLM", "FINETUNE_DATA"))


def _nyuntam_tensorrt(document: Document, config: JobConfig) -> None:
    """Its TensorRTLLM makes one result per file, of four methods, and takes the calibration's size from its section."""
    settings = config.algorithm_settings
    assert isinstance(settings, TensorRTLLMSettings)
    section = ("llm", "TensorRTLLM")
    methods = each(settings.quant_method)
    if len(methods) > 1 or methods[0] not in ORIGINAL_METHODS:
        raise ConfigError(
            f"found {', '.join(methods)}; the original system makes one result per file: set it to one of "
            f"{', '.join(ORIGINAL_METHODS)}",
            key="llm.TensorRTLLM.quant_method",
            value=settings.quant_method,
        )
    if isinstance(settings.quant_method, tuple):
        document.set((*section, "quant_method"), methods[0])
    for key, name in (("SAMPLES", "calib_size"), ("SEQUENCE_LENGTH", "max_seq_length")):
        if key in config.CALIBRATION.model_fields_set:
            document.set((*section, name), getattr(config.CALIBRATION, key))
    for spec in describe(TensorRTLLMSettings):
        if spec.key.isupper():
            document.remove((*section, spec.key))


_NYUNTAM: dict[str, Callable[[Document, JobConfig], None]] = {
    "AutoAWQ": _nyuntam_awq,
    "AQLM": _nyuntam_aqlm,
    "TensorRTLLM": _nyuntam_tensorrt,
}


def _modifiers(config: JobConfig) -> Modifiers:
    """The modifiers of an llm-compressor recipe, in the order in which they run."""
    settings = config.algorithm_settings
    if isinstance(settings, LLMCompressorSettings):
        return _llmcompressor_modifiers(settings)
    if isinstance(settings, (AQLMSettings, TensorRTLLMSettings)):
        name = config.ALGORITHM
        raise ConfigError(f"found {name!r}, which llm-compressor does not have", key="ALGORITHM", value=name)
    planned = configurations(config)
    if len(planned) > 1:
        raise ConfigError(
            f"this job makes {len(planned)} results ({', '.join(one.name for one in planned)}) and an llm-compressor "
            "recipe makes one: export a job with single values",
            key=f"llm.{config.ALGORITHM}",
        )
    recipe = planned[0].recipe
    if recipe is None:  # the AutoAWQ package: the same algorithm with the same settings
        assert isinstance(settings, AutoAWQSettings)
        scheme = Scheme("AWQ", each(settings.W_BIT)[0], each(settings.Q_GROUP_SIZE)[0], symmetric=False)
        recipe = Recipe(planned[0].name, scheme)
    return _recipe_modifiers(recipe)


# -- from the core's recipes


def _recipe_modifiers(recipe: Recipe) -> Modifiers:
    """AWQ's scales if asked for, then rounding: by GPTQ, to nearest, or each for its own Linears."""
    # Each exception's pattern leaves out what an earlier one has decided, so their order does not matter any more.
    patterns: list[str] = []
    for override in recipe.overrides:
        earlier = "".join(f"(?!{translate(o.pattern)})" for o in recipe.overrides[: len(patterns)])
        patterns.append(f"re:{earlier}{translate(override.pattern)}")
    schemes = [recipe.scheme, *(o.scheme for o in recipe.overrides if o.scheme is not None)]
    if len({scheme.scales_channels for scheme in schemes}) > 1:
        raise ConfigError(
            "some Linears are scaled by AWQ and others are not; llm-compressor's AWQModifier scales them all",
            key="llm.Native.OVERRIDES",
        )
    ignore = [HEAD, *(f"re:.*{re.escape(part)}" for part in recipe.keep if part != HEAD)]
    ignore += [pattern for pattern, o in zip(patterns, recipe.overrides, strict=True) if o.scheme is None]
    made: Modifiers = {"AWQModifier": {}} if recipe.scheme.scales_channels else {}
    for feeds_back in (True, False):
        targets = {"Linear": recipe.scheme} if recipe.scheme.feeds_back == feeds_back else {}
        others = []
        for pattern, override in zip(patterns, recipe.overrides, strict=True):
            if override.scheme is not None and override.scheme.feeds_back == feeds_back:
                targets[pattern] = override.scheme
            elif override.scheme is not None:
                others.append(pattern)
        if not targets:
            continue
        groups = {
            f"group_{i}": {"targets": [target], "weights": _weights(scheme.bits, scheme.group_size, scheme.symmetric)}
            for i, (target, scheme) in enumerate(targets.items())
        }
        common = {"ignore": [*ignore, *(others if "Linear" in targets else [])], "config_groups": groups}
        if feeds_back:
            made["GPTQModifier"] = {
                "dampening_frac": recipe.damp, "actorder": "static" if recipe.act_order else None, **common,
            }  # fmt: skip
        else:
            made["QuantizationModifier"] = common
    return made


def _weights(bits: int, group_size: int, symmetric: bool) -> dict[str, Any]:
    per_channel = group_size == PER_CHANNEL
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else group_size,
    }


# -- from llm-compressor's own section


def _llmcompressor_modifiers(settings: LLMCompressorSettings) -> Modifiers:
    pruning = {
        "sparsity": settings.SPARSITY, "mask_structure": "2:4" if settings.MASK == "2:4" else "0:0",
        "targets": settings.TARGETS, "ignore": [_pruning_ignore(name) for name in settings.IGNORE],
    }  # fmt: skip
    order = None if settings.ACTORDER == "none" else settings.ACTORDER
    common = _scheme(settings)
    known: Mapping[str, tuple[str, dict[str, Any]]] = {
        "GPTQ": ("GPTQModifier", {"dampening_frac": settings.DAMPENING_FRAC, "actorder": order, **common}),
        "RTN": ("QuantizationModifier", common),
        "KVCache": ("QuantizationModifier", common),
        "AWQ": ("AWQModifier", {}),
        "SmoothQuant": ("SmoothQuantModifier", {"smoothing_strength": settings.SMOOTHING_STRENGTH}),
        "SparseGPT": ("SparseGPTModifier", {"dampening_frac": settings.DAMPENING_FRAC, **pruning}),
        "Wanda": ("WandaPruningModifier", pruning),
        "AutoRound": (
            "AutoRoundModifier", {"iters": settings.AUTOROUND_ITERS, "enable_torch_compile": False, **common},
        ),
        "SpinQuant": ("SpinQuantModifier", {"rotations": ["R1", "R2"], "transform_type": "random-hadamard"}),
    }  # fmt: skip
    steps = ["AWQ", "RTN"] if settings.RECIPE == "AWQ" else settings.RECIPE.split("+")
    return dict(known[step] for step in steps)


def _pruning_ignore(name: str) -> str:
    """The pruning modifiers look for names with a dot at the end, `lm_head.`, which a plain name does not match."""
    return name if name.startswith("re:") else f"re:{re.escape(name)}\\.?$"


def _scheme(settings: LLMCompressorSettings) -> dict[str, Any]:
    """The preset by name, or spelled out with another group size."""
    if not settings.has_own_group_size:
        return settings.modifier
    weights = _weights(settings.weights.bits, settings.group_size, settings.weights.symmetric)
    return {**settings.modifier, "config_groups": {"group_0": {"targets": settings.TARGETS, "weights": weights}}}
