"""Settings of `llm: LLMCompressor:`, the recipes of the llm-compressor package.

`TARGETS`, `IGNORE`, `SCHEME` and the default recipe are those of its int4 guide: GPTQ, W4A16, every Linear but the
head. What may be combined with what stands in `backend.schema.llm_tables`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, StrictBool, StrictInt, ValidationInfo, field_validator, model_validator

from backend.schema.facts import LLM_COMPRESSOR, OWN, When, llm_compressor, when
from backend.schema.fields import setting
from backend.schema.llm_tables import (
    FREE_GROUP_RECIPES,
    INTEGER_WEIGHTS,
    KV_RECIPES,
    NATIVE_RECIPES,
    NO_SCHEME,
    PER_CHANNEL,
    RECIPES,
    SCHEMES,
    RecipeFacts,
    WeightScheme,
)
from backend.schema.section import AlgorithmSection


def _used(key: str) -> When:
    """The recipes that a setting changes."""
    return when("RECIPE", *(name for name, facts in RECIPES.items() if key in facts.uses))


class LLMCompressorSettings(AlgorithmSection):
    """One recipe of llm-compressor.

    Sources: GPTQ (arXiv 2210.17323), AWQ (2306.00978), SmoothQuant (2211.10438), SparseGPT (2301.00774),
    Wanda (2306.11695), AutoRound (2309.05516), SpinQuant (2405.16406).
    """

    # Defaults are validated too: each rule stands at the key that has to change.
    model_config = ConfigDict(extra="ignore", frozen=True, validate_default=True)

    RECIPE: Literal[
        "GPTQ", "RTN", "AWQ", "AWQ+GPTQ", "SmoothQuant+GPTQ", "SparseGPT", "Wanda", "SparseGPT+RTN", "AutoRound",
        "SpinQuant+RTN", "KVCache",
    ] = setting(
        "GPTQ", label="Recipe", section="LLMCompressor", source=LLM_COMPRESSOR,
        help="Method. GPTQ is the guide's. RTN and SpinQuant+RTN need no text; SparseGPT and Wanda prune; "
        "KVCache only shrinks the attention's cache.",
    )  # fmt: skip
    SCHEME: Literal[
        "W4A16", "W4A16_ASYM", "W8A16", "W3A16", "W2A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16",
        "MXFP4", "NONE",
    ] = setting(
        "W4A16", label="Scheme", section="LLMCompressor", source=llm_compressor("QuantizationModifier", "scheme"),
        help="Number format: W4A16 is 4-bit weights beside 16-bit activations. NONE keeps 16-bit weights "
        "(SparseGPT, Wanda, KVCache). Not given: the recipe's own.",
    )  # fmt: skip
    TARGETS: list[str] = setting(
        default_factory=lambda: ["Linear"], label="Targets", section="LLMCompressor",
        source=llm_compressor("QuantizationModifier", "targets"), advanced=True,
        help="What is compressed: module classes, module names, or 're:' and a regular expression over names.",
    )  # fmt: skip
    IGNORE: list[str] = setting(
        default_factory=lambda: ["lm_head"], label="Left alone", section="LLMCompressor",
        source=llm_compressor("QuantizationModifier", "ignore"),
        help="Modules that stay in 16 bits: names, or 're:' and a regular expression over names.",
    )  # fmt: skip
    GROUP_SIZE: Literal[128, 64, 32, -1] | None = setting(
        None, label="Group size", section="LLMCompressor",
        source=llm_compressor("QuantizationModifier", "config_groups"),
        visible_when=[when("RECIPE", *FREE_GROUP_RECIPES), when("SCHEME", *INTEGER_WEIGHTS)],
        unit="weights", advanced=True,
        help="Weights along the input that share a scale, for integer weights; -1: a whole row. "
        "Empty: the scheme's own, 128.",
    )  # fmt: skip
    KV_CACHE_FP8: StrictBool = setting(
        False, label="8-bit KV cache", section="LLMCompressor",
        source=llm_compressor("QuantizationModifier", "kv_cache_scheme"), visible_when=when("RECIPE", "GPTQ", "RTN"),
        advanced=True,
        help="On: the checkpoint also carries scales for an attention cache in 8-bit floats (GPTQ and RTN).",
    )  # fmt: skip
    DAMPENING_FRAC: float = setting(
        0.01, label="Damping", section="LLMCompressor",
        source=llm_compressor("GPTQModifier", "dampening_frac"), visible_when=_used("DAMPENING_FRAC"),
        ge=1e-6, le=1.0, advanced=True,
        help="GPTQ and SparseGPT add this part of the mean diagonal to the Hessian, so that it can be inverted.",
    )  # fmt: skip
    ACTORDER: Literal["static", "none"] = setting(
        "static", label="Activation order", section="LLMCompressor",
        source=llm_compressor("GPTQModifier", "actorder"), visible_when=_used("ACTORDER"),
        advanced=True,
        help="Order in which GPTQ rounds columns: static (by activation; groups stay in place), none (left to right).",
    )  # fmt: skip
    SMOOTHING_STRENGTH: float = setting(
        0.8, label="Smoothing", section="LLMCompressor",
        source=llm_compressor("SmoothQuantModifier", "smoothing_strength"), visible_when=_used("SMOOTHING_STRENGTH"),
        ge=0.0, le=1.0, advanced=True,
        help="SmoothQuant: how much of the outliers moves from activations (0) into weights (1).",
    )  # fmt: skip
    MASK: Literal["2:4", "unstructured"] = setting(
        "2:4", label="Mask", section="LLMCompressor",
        source=llm_compressor("SparseGPTModifier", "mask_structure"), visible_when=_used("MASK"),
        advanced=True,
        help="SparseGPT and Wanda: 2:4 is two zeros in every four weights, which GPUs speed up; unstructured "
        "puts zeros anywhere.",
    )  # fmt: skip
    SPARSITY: float = setting(
        0.5, label="Sparsity", section="LLMCompressor",
        source=llm_compressor("SparseGPTModifier", "sparsity"),
        visible_when=[_used("SPARSITY"), when("MASK", "unstructured")],
        ge=0.05, le=0.95, advanced=True,
        help="SparseGPT and Wanda: part of the weights that becomes zero. With mask 2:4 it is 0.5.",
    )  # fmt: skip
    AUTOROUND_ITERS: StrictInt = setting(
        200, label="Iterations", section="LLMCompressor",
        source=llm_compressor("AutoRoundModifier", "iters"), visible_when=_used("AUTOROUND_ITERS"),
        unit="steps", ge=1, le=5000, advanced=True,
        help="AutoRound: steps of learning per decoder layer.",
    )  # fmt: skip
    dtype: Literal["bfloat16", "float16"] = setting(
        "bfloat16", label="16-bit type", section="LLMCompressor", source=OWN, advanced=True,
        help="Type in which the model is loaded and its unquantized tensors are stored.",
    )  # fmt: skip
    ENGINE: Literal["llmcompressor", "native"] = setting(
        "llmcompressor", label="Engine", section="LLMCompressor",
        source=OWN, visible_when=when("RECIPE", *NATIVE_RECIPES), advanced=True,
        help="llmcompressor is the package itself, with the whole model in memory. native makes the same kind of "
        "checkpoint with Quantdeck's streamed core: GPTQ, RTN, AWQ and AWQ+GPTQ with integer weights.",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _scheme_of_the_recipe(cls, values: Any) -> Any:
        # An empty value means what a file without the key means.
        if not isinstance(values, dict):
            return values
        values = {key: value for key, value in values.items() if value is not None and value != ""}
        recipe = RECIPES.get(str(values.get("RECIPE", "GPTQ")))
        if recipe is not None and "SCHEME" not in values:
            values["SCHEME"] = recipe.schemes[0]
        return values

    @field_validator("TARGETS", "IGNORE", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [value] if value.startswith("re:") else [part.strip() for part in value.split(",") if part.strip()]
        return value

    @field_validator("TARGETS")
    @classmethod
    def _some_target(cls, value: list[str]) -> list[str]:
        if not value:
            raise ValueError("name what is to be compressed, e.g. Linear")
        return value

    @field_validator("SCHEME")
    @classmethod
    def _pair(cls, value: str, info: ValidationInfo) -> str:
        recipe = info.data.get("RECIPE")
        if recipe is None or value in RECIPES[recipe].schemes:
            return value
        others = ", ".join(name for name, facts in RECIPES.items() if value in facts.schemes)
        raise ValueError(
            f"RECIPE {recipe} makes {', '.join(RECIPES[recipe].schemes)}; choose one of these, "
            f"or for {value} one of the recipes {others}"
        )

    @field_validator("GROUP_SIZE")
    @classmethod
    def _group(cls, value: int | None, info: ValidationInfo) -> int | None:
        recipe, scheme = info.data.get("RECIPE"), info.data.get("SCHEME")
        if value is None or recipe is None or scheme is None:
            return value
        if recipe not in FREE_GROUP_RECIPES or scheme not in INTEGER_WEIGHTS:
            raise ValueError(
                f"it can be set for {', '.join(FREE_GROUP_RECIPES)} with {', '.join(INTEGER_WEIGHTS)}; "
                f"leave it empty for {recipe} with {scheme}, which has its own"
            )
        return value

    @field_validator("KV_CACHE_FP8")
    @classmethod
    def _cache(cls, value: bool, info: ValidationInfo) -> bool:
        recipe = info.data.get("RECIPE")
        if value and recipe is not None and recipe not in KV_RECIPES:
            raise ValueError(f"it goes with RECIPE {', '.join(KV_RECIPES)}; set it to False for {recipe}")
        return value

    @field_validator("SPARSITY")
    @classmethod
    def _half(cls, value: float, info: ValidationInfo) -> float:
        if info.data.get("MASK") == "2:4" and value != 0.5:
            raise ValueError("mask 2:4 means 0.5; set SPARSITY to 0.5 or MASK to unstructured")
        return value

    @field_validator("ENGINE")
    @classmethod
    def _native_can(cls, value: str, info: ValidationInfo) -> str:
        if value == "native" and (reason := _not_native(info.data)):
            raise ValueError(f"{reason}; use ENGINE llmcompressor")
        return value

    @property
    def facts(self) -> RecipeFacts:
        """What the recipe is."""
        return RECIPES[self.RECIPE]

    @property
    def weights(self) -> WeightScheme:
        """What the scheme is; its `group_size` is the preset's, `group_size` here the one in use."""
        return SCHEMES[self.SCHEME]

    @property
    def group_size(self) -> int:
        """Weights along the input that share a scale, as `WeightScheme.group_size`."""
        return self.weights.group_size if self.GROUP_SIZE is None else self.GROUP_SIZE

    @property
    def has_own_group_size(self) -> bool:
        """Whether the preset of that name would have other groups."""
        return self.SCHEME != NO_SCHEME and self.group_size != self.weights.group_size

    @property
    def modifier(self) -> dict[str, Any]:
        """What every quantizing modifier of the package is told; of an own group size, all but the groups."""
        told: dict[str, Any] = {"ignore": self.IGNORE}
        if self.KV_CACHE_FP8 or self.RECIPE == "KVCache":
            told["kv_cache_scheme"] = {
                "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True,
            }  # fmt: skip
        if self.SCHEME != NO_SCHEME and not self.has_own_group_size:
            told |= {"scheme": self.SCHEME, "targets": self.TARGETS}
        return told

    @property
    def needs_text(self) -> bool:
        """Whether calibration text changes the result."""
        return self.facts.needs_text or self.weights.needs_text or self.KV_CACHE_FP8

    @property
    def label(self) -> str:
        """Short name of the configuration, fit for a folder, e.g. `gptq-w4a16-g128`."""
        parts = [self.RECIPE.lower().replace("+", "-")]
        if self.SCHEME != NO_SCHEME:
            parts.append(self.SCHEME.lower().replace("_", "-"))
        if self.weights.weight_only:
            parts.append("channel" if self.group_size == PER_CHANNEL else f"g{self.group_size}")
        if "MASK" in self.facts.uses:
            parts.append(f"{self.MASK.replace(':', 'of')}-{round(self.SPARSITY * 100)}")
        if self.KV_CACHE_FP8 and self.RECIPE != "KVCache":
            parts.append("kvfp8")
        return "-".join(parts)


def _not_native(data: dict[str, Any]) -> str | None:
    """Why Quantdeck's own core cannot do what the other keys ask for."""
    recipe, scheme, ignore = data.get("RECIPE"), data.get("SCHEME"), data.get("IGNORE")
    if recipe is not None and recipe not in NATIVE_RECIPES:
        return f"the native core has {', '.join(NATIVE_RECIPES)}, not {recipe}"
    if scheme is not None and scheme not in INTEGER_WEIGHTS:
        return f"the native core makes {', '.join(INTEGER_WEIGHTS)}, not {scheme}"
    if data.get("KV_CACHE_FP8"):
        return "the native core has no 8-bit KV cache"
    if data.get("TARGETS") not in (None, ["Linear"]):
        return f"the native core compresses Linear, not {', '.join(data['TARGETS'])}"
    if patterns := [name for name in ignore or () if name.startswith("re:")]:
        return f"the native core takes names in IGNORE, not regular expressions like {patterns[0]}"
    if ignore is not None and "lm_head" not in ignore:
        return "the native core leaves the head in 16 bits; add lm_head to IGNORE"
    return None
