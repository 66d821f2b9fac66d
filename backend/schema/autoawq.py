"""Settings of `llm: AutoAWQ:`, the activation-aware weight quantization of the guide.

Upper-case names, defaults and allowed values are those of the guide's YAML; the group sizes are the ones
that its comment lists. `ENGINE` and `FORMAT` are Quantdeck's own.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, StrictBool, model_validator

from backend.schema.facts import AWQ_GUIDE, NYUNTAM, OWN, unless
from backend.schema.fields import OneOrMore, drop_empty, each, setting
from backend.schema.section import AlgorithmSection

BITS_OF_FORMAT = 4  # of the AutoAWQ checkpoint layouts


class AutoAWQSettings(AlgorithmSection):
    """AWQ: scale salient input channels, clip group ranges, round to a few bits.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    ZERO_POINT: StrictBool = setting(
        True,
        label="Zero point",
        section="AutoAWQ",
        source=AWQ_GUIDE,
        help="On: each group has its own zero (asymmetric, lower error). Off: symmetric around the middle code.",
    )
    W_BIT: OneOrMore[Literal[2, 3, 4, 8]] = setting(
        4,
        label="Weight bits",
        section="AutoAWQ",
        source=AWQ_GUIDE,
        unit="bits",
        help="Bits per quantized weight; several make one result each. The AutoAWQ checkpoint format holds 4 bits. "
        "Below 4 bits AWQ alone hardly beats plain rounding: choose algorithm Native with GPTQ or AWQ+GPTQ there.",
    )
    Q_GROUP_SIZE: OneOrMore[Literal[128, 64, 32]] = setting(
        128,
        label="Group size",
        section="AutoAWQ",
        source=AWQ_GUIDE,
        unit="weights",
        help="Weights along the input that share a scale and a zero. Smaller is more exact and larger on disk; "
        "several make one result each. A Linear whose input it does not divide stays in 16 bits.",
    )
    VERSION: Literal["GEMM", "GEMV"] = setting(
        "GEMM",
        label="Packing",
        section="AutoAWQ",
        source=AWQ_GUIDE,
        visible_when=unless("FORMAT", "compressed-tensors"),
        help="Layout of the packed weights: GEMM suits prompts and batches, GEMV single-stream decoding. "
        "Both hold the same numbers. The compressed-tensors format has a layout of its own.",
    )
    dtype: Literal["float16", "bfloat16"] = setting(
        "float16",
        label="16-bit type",
        section="AutoAWQ",
        source=NYUNTAM,
        advanced=True,
        help="Type in which the tensors that stay unquantized (embeddings, norms, head) are stored. "
        "AutoAWQ's GPU kernels expect float16.",
    )
    FORMAT: Literal["auto", "autoawq", "compressed-tensors"] = setting(
        "auto",
        label="Checkpoint format",
        section="AutoAWQ",
        source=OWN,
        advanced=True,
        help="auto: autoawq if all results have 4 bits, otherwise compressed-tensors, which holds all bits.",
    )
    ENGINE: Literal["native", "autoawq"] = setting(
        "native",
        label="Engine",
        section="AutoAWQ",
        source=OWN,
        advanced=True,
        help="native is Quantdeck's own core. autoawq is the original package in an environment of its own "
        "(python -m backend engines install autoawq); it takes CPU hours where the core takes minutes.",
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @model_validator(mode="after")
    def _fits_together(self) -> AutoAWQSettings:
        other_bits = [bits for bits in each(self.W_BIT) if bits != BITS_OF_FORMAT]
        if self.FORMAT == "autoawq" and other_bits:
            raise ValueError(
                f"FORMAT: found 'autoawq', which holds 4-bit weights only, beside W_BIT {_text(self.W_BIT)}; "
                "use compressed-tensors or auto, or set W_BIT to 4"
            )
        if self.ENGINE == "autoawq":
            self._check_package(other_bits)
        return self

    def _check_package(self, other_bits: list[int]) -> None:
        """What the original package cannot do; it would notice only after the first layer's search."""
        way = "change it, or use ENGINE native"
        if len(each(self.W_BIT)) > 1 or other_bits:
            raise ValueError(f"W_BIT: found {_text(self.W_BIT)}; engine autoawq makes 4 bits only; {way}")
        if len(each(self.Q_GROUP_SIZE)) > 1:
            raise ValueError(
                f"Q_GROUP_SIZE: found {_text(self.Q_GROUP_SIZE)}; engine autoawq makes one result per job; {way}"
            )
        if not self.ZERO_POINT:
            raise ValueError(f"ZERO_POINT: found False; engine autoawq needs zero points; {way}")
        if self.FORMAT == "compressed-tensors":
            raise ValueError(f"FORMAT: found 'compressed-tensors'; engine autoawq writes its own format; {way}")

    @property
    def layout(self) -> str:
        """Name of the checkpoint layout: `autoawq-gemm`, `autoawq-gemv` or `compressed-tensors`."""
        all_four = all(bits == BITS_OF_FORMAT for bits in each(self.W_BIT))
        if self.FORMAT == "compressed-tensors" or (self.FORMAT == "auto" and not all_four):
            return "compressed-tensors"
        return f"autoawq-{self.VERSION.lower()}"


def _text(value: int | tuple[int, ...]) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)
