"""Settings of `llm: Native:`, Quantdeck's own core with all that it can do.

Lists of methods, bits and group sizes make one result for each combination, all from one pass over the
calibration text. `OVERRIDES` are exceptions for some Linears, as plain data.
"""

from __future__ import annotations

import difflib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictFloat, StrictInt, field_validator, model_validator

from backend.quantize.recipe import PER_CHANNEL
from backend.schema.facts import OWN, unless, when
from backend.schema.fields import OneOrMore, drop_empty, each, setting
from backend.schema.section import AlgorithmSection

MAX_CONFIGURATIONS = 16
AUTOAWQ_BITS = 4

Method = Literal["GPTQ", "AWQ+GPTQ", "AWQ", "RTN"]
Bits = Literal[2, 3, 4, 8]
GroupSize = Literal[128, 64, 32, -1]


class OverrideSettings(BaseModel):
    """An exception: what happens to the Linears whose names match a pattern. What it leaves out stays as it is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    PATTERN: str = setting(
        label="Pattern",
        section="Native",
        source=OWN,
        help="Shell-style pattern over full names of Linears, e.g. model.layers.0.* or *.down_proj.",
    )
    METHOD: Method | None = setting(
        None, label="Method", section="Native", source=OWN, help="Another method for these Linears."
    )
    W_BIT: Bits | None = setting(
        None, label="Weight bits", section="Native", source=OWN, unit="bits", help="Other bits for these Linears."
    )
    Q_GROUP_SIZE: GroupSize | None = setting(
        None,
        label="Group size",
        section="Native",
        source=OWN,
        unit="weights",
        help="Another group size for these Linears.",
    )
    SYMMETRIC: StrictBool | None = setting(
        None, label="Symmetric", section="Native", source=OWN, help="Another symmetry for these Linears."
    )
    KEEP: StrictBool = setting(
        False,
        label="Keep",
        section="Native",
        source=OWN,
        help="On: these Linears stay in 16 bits, and nothing else is said.",
    )

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, values: Any) -> Any:
        known = list(cls.model_fields)
        for key in values if isinstance(values, dict) else ():
            if key not in known:
                near = difflib.get_close_matches(str(key).upper(), known, n=1, cutoff=0.6)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ValueError(f"found the key {key!r}; allowed: {', '.join(known)}{hint}")
        return drop_empty(values)

    @model_validator(mode="after")
    def _says_something(self) -> OverrideSettings:
        changes = self.changes
        if self.KEEP and changes:
            raise ValueError(f"KEEP: found True beside {', '.join(changes)}; what stays in 16 bits has none of these")
        if not self.KEEP and not changes:
            raise ValueError(
                "PATTERN: nothing is said about these Linears; "
                "give METHOD, W_BIT, Q_GROUP_SIZE, SYMMETRIC or KEEP: True"
            )
        return self

    @property
    def changes(self) -> dict[str, Any]:
        """The keys that differ from the rest of the model."""
        found = {key: getattr(self, key) for key in ("METHOD", "W_BIT", "Q_GROUP_SIZE", "SYMMETRIC")}
        return {key: value for key, value in found.items() if value is not None}


class NativeSettings(AlgorithmSection):
    """RTN, AWQ, GPTQ or both together, at 2 to 8 bits.

    Sources: Lin et al. 2023 (AWQ, arXiv 2306.00978); Frantar et al. 2022 (GPTQ, arXiv 2210.17323).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    METHOD: OneOrMore[Method] = setting(
        "GPTQ",
        label="Method",
        section="Native",
        source=OWN,
        help="GPTQ corrects the error of each column in the next ones; AWQ scales the channels that matter most; "
        "AWQ+GPTQ does both, and corrects and refines what it can: least error, most time; RTN rounds to nearest. AWQ "
        "alone hardly beats plain rounding below 4 bits. Several make one result each.",
    )
    W_BIT: OneOrMore[Bits] = setting(
        4,
        label="Weight bits",
        section="Native",
        source=OWN,
        unit="bits",
        help="Bits per quantized weight. Several make one result each, all from one pass over the calibration text.",
    )
    Q_GROUP_SIZE: OneOrMore[GroupSize] = setting(
        128,
        label="Group size",
        section="Native",
        source=OWN,
        unit="weights",
        help="Weights along the input that share a scale and a zero; -1: all of a row. Smaller is more exact and "
        "larger on disk. Several make one result each.",
    )
    SYMMETRIC: StrictBool = setting(
        False,
        label="Symmetric",
        section="Native",
        source=OWN,
        help="Off: each group has its own zero (lower error). On: the middle code stands for 0, which more GPU "
        "kernels support.",
    )
    FORMAT: Literal["compressed-tensors", "GEMM", "GEMV"] = setting(
        "compressed-tensors",
        label="Checkpoint format",
        section="Native",
        source=OWN,
        help="compressed-tensors holds everything and loads in transformers and vLLM. GEMM and GEMV are AutoAWQ's "
        "layouts: 4 bits, one group size.",
    )
    KEEP: list[str] = setting(
        default_factory=lambda: ["lm_head"],
        label="Left alone",
        section="Native",
        source=OWN,
        advanced=True,
        help="Linears whose name contains one of these stay in 16 bits; [] for none.",
    )
    MISFIT: Literal["keep", "fit"] = setting(
        "keep",
        label="Odd sizes",
        section="Native",
        source=OWN,
        visible_when=[(unless("Q_GROUP_SIZE", -1), unless("OVERRIDES", None))],
        advanced=True,
        help="For a Linear whose input the group size does not divide. keep: it stays in 16 bits. fit: it gets the "
        "largest group size that divides it.",
    )
    ACT_ORDER: StrictBool = setting(
        True,
        label="Activation order",
        section="Native",
        source=OWN,
        visible_when=[(when("METHOD", "GPTQ", "AWQ+GPTQ"), unless("OVERRIDES", None))],
        advanced=True,
        help="GPTQ rounds the inputs with the most energy first. Groups stay in place, so running costs nothing more.",
    )
    DAMP: StrictFloat = setting(
        0.01,
        label="Damping",
        section="Native",
        source=OWN,
        visible_when=[(when("METHOD", "GPTQ", "AWQ+GPTQ"), unless("OVERRIDES", None))],
        ge=0.0001,
        le=1.0,
        advanced=True,
        help="GPTQ adds this part of the mean diagonal to H, so that it can be inverted; raised where that fails.",
    )
    CORRECT: StrictBool = setting(
        True,
        label="Correct",
        section="Native",
        source=OWN,
        visible_when=[(when("METHOD", "AWQ+GPTQ"), unless("OVERRIDES", None))],
        advanced=True,
        help="AWQ+GPTQ: later Linears of a layer make up for the errors of earlier ones. Takes most of its time.",
    )
    REFINE: StrictInt = setting(
        2,
        label="Refinement",
        section="Native",
        source=OWN,
        visible_when=[(when("METHOD", "AWQ+GPTQ"), unless("OVERRIDES", None))],
        unit="sweeps",
        ge=0,
        le=20,
        advanced=True,
        help="AWQ+GPTQ: times that all steps and codes are improved after the rounding; 0 for never.",
    )
    OVERRIDES: list[OverrideSettings] = setting(
        default_factory=list,
        label="Exceptions",
        section="Native",
        source=OWN,
        advanced=True,
        as_yaml=True,
        help="Exceptions for some Linears; the first pattern that matches decides. "
        "E.g. {PATTERN: '*.down_proj', W_BIT: 8}, {PATTERN: 'model.layers.0.*', KEEP: True}.",
    )
    dtype: Literal["auto", "float16", "bfloat16"] = setting(
        "auto",
        label="16-bit type",
        section="Native",
        source=OWN,
        advanced=True,
        help="Type in which the tensors that stay unquantized are stored. auto: as in the model, and float16 for "
        "GEMM and GEMV, whose kernels expect it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @field_validator("KEEP", mode="before")
    @classmethod
    def _one_name_is_a_list(cls, value: Any) -> Any:
        return [part.strip() for part in value.split(",")] if isinstance(value, str) else value

    @field_validator("KEEP")
    @classmethod
    def _no_empty_part(cls, value: list[str]) -> list[str]:
        if not all(part.strip() for part in value):
            raise ValueError("every name contains an empty part; write e.g. [lm_head], or [] for none")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> NativeSettings:
        count = len(each(self.METHOD)) * len(each(self.W_BIT)) * len(each(self.Q_GROUP_SIZE))
        if count > MAX_CONFIGURATIONS:
            raise ValueError(
                f"METHOD: the lists of METHOD, W_BIT and Q_GROUP_SIZE make {count} results; "
                f"a job makes at most {MAX_CONFIGURATIONS}"
            )
        if self.FORMAT != "compressed-tensors":
            self._check_autoawq_layout()
        return self

    def _check_autoawq_layout(self) -> None:
        """AutoAWQ's layouts hold 4 bits with one group size; config.json has a single one for all Linears."""
        way = f"{self.FORMAT} holds 4 bits in groups of one size; use FORMAT compressed-tensors, or change it"
        places: list[tuple[str, int | tuple[int, ...], int | tuple[int, ...]]] = [("", self.W_BIT, self.Q_GROUP_SIZE)]
        places += [
            (f"OVERRIDES.{i}.", o.W_BIT or AUTOAWQ_BITS, o.Q_GROUP_SIZE or self.Q_GROUP_SIZE)
            for i, o in enumerate(self.OVERRIDES)
        ]
        for prefix, bits, group_size in places:
            for value in each(bits):
                if value != AUTOAWQ_BITS:
                    raise ValueError(f"{prefix}W_BIT: found {value}; {way}")
            if PER_CHANNEL in each(group_size):
                raise ValueError(f"{prefix}Q_GROUP_SIZE: found {PER_CHANNEL}; {way}")
            if prefix and group_size != self.Q_GROUP_SIZE:
                raise ValueError(f"{prefix}Q_GROUP_SIZE: found {group_size}; {way}")

    @property
    def layout(self) -> str:
        """Name of the checkpoint layout: `autoawq-gemm`, `autoawq-gemv` or `compressed-tensors`."""
        return self.FORMAT if self.FORMAT == "compressed-tensors" else f"autoawq-{self.FORMAT.lower()}"

    @property
    def stored_dtype(self) -> str | None:
        """Type of the unquantized tensors; None: as in the model."""
        if self.dtype != "auto":
            return self.dtype
        return None if self.FORMAT == "compressed-tensors" else "float16"
