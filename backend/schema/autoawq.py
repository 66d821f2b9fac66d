"""Settings of `llm: AutoAWQ:`, the activation-aware weight quantization of the guide.

Upper-case names, defaults and allowed values are those of the guide's YAML; the group sizes are the ones
that its comment lists.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, StrictBool

from backend.schema.fields import setting


class AutoAWQSettings(BaseModel):
    """AWQ: scale salient input channels, clip group ranges, round to 4 bits.

    Source: Lin et al. 2023, "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978).
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    ZERO_POINT: StrictBool = setting(
        True,
        label="Zero point",
        section="AutoAWQ",
        help="On: each group has its own zero (asymmetric, lower error). Off: symmetric around 8.",
    )
    W_BIT: Literal[4] = setting(
        4,
        label="Weight bits",
        section="AutoAWQ",
        unit="bits",
        help="Bits per quantized weight. The AutoAWQ checkpoint format holds 4-bit weights.",
    )
    Q_GROUP_SIZE: Literal[128, 64, 32] = setting(
        128,
        label="Group size",
        section="AutoAWQ",
        unit="weights",
        help="Weights along the input that share a scale and a zero. Smaller is more exact and larger on disk. "
        "It must divide the input width of every quantized layer.",
    )
    VERSION: Literal["GEMM", "GEMV"] = setting(
        "GEMM",
        label="Packing",
        section="AutoAWQ",
        help="Layout of the packed weights: GEMM suits prompts and batches, GEMV single-stream decoding. "
        "Both hold the same numbers.",
    )
    dtype: Literal["float16", "bfloat16"] = setting(
        "float16",
        label="16-bit type",
        section="AutoAWQ",
        advanced=True,
        help="Type in which the tensors that stay unquantized (embeddings, norms, head) are stored. "
        "AutoAWQ's GPU kernels expect float16.",
    )
