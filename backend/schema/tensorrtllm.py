"""Settings of `llm: TensorRTLLM:`: quantize with nvidia-modelopt, then build and run in TensorRT-LLM.

Lower-case names and defaults are those of the guide and of the original system's example file. TensorRT-LLM has changed
under both: what it has no more is mapped or explained. Upper-case keys are Quantdeck's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, StrictBool, StrictFloat, StrictInt, model_validator

from backend.schema.errors import ProblemAt
from backend.schema.facts import MODELOPT, OWN, TENSORRT_EXAMPLE, TENSORRT_GUIDE, unless, when
from backend.schema.fields import Group, OneOrMore, drop_empty, each, setting
from backend.schema.section import AlgorithmSection
from backend.tensorrt_llm.methods import ENGINE, LEGACY_VERSION, METHODS, PYTORCH

QUANTIZE = "TensorRTLLM"
RUN = "TensorRTLLM run"
LENGTHS = "TensorRTLLM engine"
NO_EFFECT = "TensorRTLLM without effect"

CALIBRATED = [when("to_quantize", True), when("quant_method", *(m.name for m in METHODS.values() if m.needs_text))]
AWQ = [when("to_quantize", True), when("quant_method", *(m.name for m in METHODS.values() if m.grouped))]

quantize = partial(setting, section=QUANTIZE, source=TENSORRT_EXAMPLE)
run = partial(setting, section=RUN, source=OWN, visible_when=when("BENCHMARK.ENABLED", True))
lengths = partial(setting, section=LENGTHS, source=TENSORRT_EXAMPLE, advanced=True)
no_effect = partial(setting, section=NO_EFFECT, source=TENSORRT_EXAMPLE, advanced=True, ignored=True)

_BASE_ONLY = "The original reads it only for a Llama that it does not quantize; modelopt decides it by itself."


class TensorRTLLMSettings(AlgorithmSection):
    """Post-training quantization by nvidia-modelopt for TensorRT-LLM.

    Sources: the guide; nvidia-modelopt 0.47; TensorRT-LLM 1.2.1.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    GROUPS: ClassVar[tuple[Group, ...]] = (
        Group(QUANTIZE),
        Group(
            RUN,
            "Run in TensorRT-LLM",
            "Needs an NVIDIA GPU, and TensorRT-LLM in an environment or a container image. Without them the job still "
            "quantizes, exports and measures, and hands over the commands that do the rest elsewhere.",
        ),
        Group(LENGTHS, "Sizes of the engine", "What the engine, or the server, is made for."),
        Group(
            NO_EFFECT,
            "Kept for the original's file",
            "The original's example file has these keys. Nothing here depends on them; each says why.",
            ignored=True,
        ),
    )

    to_quantize: StrictBool = quantize(
        True, label="Quantize", source=TENSORRT_GUIDE,
        help="Off: the model is only exported in its 16-bit type, as the baseline of the guide's table.",
    )  # fmt: skip
    quant_method: OneOrMore[Literal["int4_awq", "fp8", "smoothquant", "int8", "w4a8_awq", "nvfp4"]] = quantize(
        "int4_awq", label="Method", source=TENSORRT_GUIDE, visible_when=when("to_quantize", True),
        help="int4_awq: 4-bit weights, any GPU from Ampere on. fp8: Ada and later. smoothquant and int8 run only in "
        f"engines of TensorRT-LLM {LEGACY_VERSION}. w4a8_awq: 4-bit weights with FP8 activations. nvfp4 is for "
        "Blackwell, and needs a GPU to quantize too. Several make one result each.",
    )  # fmt: skip
    dtype: Literal["float16", "bfloat16"] = quantize(
        "float16",
        label="16-bit type",
        source=TENSORRT_GUIDE,
        help="Type of everything that is not quantized, and of the computation.",
    )
    smoothquant: StrictFloat = quantize(
        0.5, label="SmoothQuant strength",
        source=TENSORRT_GUIDE, visible_when=[when("to_quantize", True), when("quant_method", "smoothquant")],
        ge=0.0, le=1.0,
        help="Only for smoothquant: how much of the activations' outliers is moved into the weights.",
    )  # fmt: skip
    calib_size: StrictInt = quantize(
        32, label="Calibration samples",
        source=TENSORRT_GUIDE, visible_when=CALIBRATED, unit="sequences", ge=1, le=65536,
        help="Sequences of the calibration text that are read. CALIBRATION.SAMPLES counts more, if the file has it.",
    )  # fmt: skip
    max_seq_length: StrictInt = quantize(
        2048, label="Calibration length", visible_when=CALIBRATED, unit="tokens", ge=16, le=131072, advanced=True,
        help="Tokens per calibration sequence; for a model with fewer positions they are cut into pieces. "
        "CALIBRATION.SEQUENCE_LENGTH counts more, if the file has it.",
    )  # fmt: skip
    batch_size: StrictInt = quantize(
        1, label="Calibration batch", visible_when=CALIBRATED, unit="sequences", ge=1, le=1024, advanced=True,
        help="Sequences per forward pass of the calibration.",
    )  # fmt: skip
    awq_block_size: Literal[128, 64] = quantize(
        128, label="AWQ block size", visible_when=AWQ, unit="weights", advanced=True,
        help="Weights along the input that share a scale, for int4_awq and w4a8_awq. TensorRT-LLM's kernels have 64 "
        "and 128; the original ignores the value and takes 128.",
    )  # fmt: skip
    AWQ_ALPHA_STEP: StrictFloat = quantize(
        0.1, label="AWQ search step", source=MODELOPT, visible_when=AWQ, ge=0.01, le=1.0, advanced=True,
        help="How finely AWQ's scales are searched: 0.1 tries 11 values per Linear, as modelopt does, 0.5 tries 3.",
    )  # fmt: skip
    # -- run
    BACKEND: Literal["auto", "pytorch", "tensorrt"] = run(
        "auto", label="Backend", visible_when=(),
        help=f"pytorch is TensorRT-LLM's own successor of its engines. tensorrt builds an engine, which only releases "
        f"up to {LEGACY_VERSION} can. auto: pytorch, or tensorrt for methods that run only there.",
    )  # fmt: skip
    EXECUTOR: Literal["auto", "environment", "docker", "none"] = run(
        "auto", label="Where TensorRT-LLM is",
        help="environment: the one that quantdeck.toml names ([tensorrt_llm] environment). docker: the pinned "
        "container image. auto: the environment if there is one, else docker. none: nothing is run, the commands are "
        "handed over.",
    )  # fmt: skip
    REQUESTS: StrictInt = run(
        64, label="Requests", unit="requests", ge=1, le=100_000, advanced=True,
        help="Requests of the run at full load. How long each is, BENCHMARK says.",
    )  # fmt: skip
    CONCURRENCY: StrictInt = run(
        16, label="Requests at once", unit="requests", ge=1, le=4096, advanced=True,
        help="Requests at a time in the run at full load; the other run has one at a time, like the guide's table.",
    )  # fmt: skip
    KV_CACHE_FRACTION: StrictFloat = run(
        0.2, label="Memory for the KV cache", unit="of free GPU memory", ge=0.01, le=0.95, advanced=True,
        help="TensorRT-LLM takes 0.9 by itself, whatever the model needs; memory in use then says nothing.",
    )  # fmt: skip
    # -- sizes
    max_batch_size: StrictInt = lengths(
        1, label="Largest batch", unit="sequences", ge=1, le=4096,
        help="Sequences at a time. The run at full load has at least as many as CONCURRENCY.",
    )  # fmt: skip
    max_input_len: StrictInt = lengths(
        1024, label="Longest prompt", unit="tokens", ge=1, le=1_048_576, help="Tokens of a prompt at most."
    )
    max_output_len: StrictInt = lengths(
        1024, label="Longest answer", unit="tokens", ge=1, le=1_048_576,
        help="Tokens of an answer at most. TensorRT-LLM has one length for both now: it gets the sum with "
        "max_input_len as max_seq_len.",
    )  # fmt: skip
    max_beam_width: StrictInt = lengths(
        1, label="Beams", unit="beams", ge=1, le=64, help="Beams of a search; 1 is sampling or greedy decoding."
    )
    max_num_tokens: StrictInt | None = lengths(
        None, label="Tokens per step", unit="tokens", ge=1, le=1_048_576, empty="TensorRT-LLM's own",
        help="Tokens of all sequences of a step at most.",
    )  # fmt: skip
    max_prompt_embedding_table_size: StrictInt = lengths(
        0, label="Prompt tuning table", visible_when=unless("BACKEND", "pytorch"), unit="rows", ge=0, le=1_048_576,
        help="Rows of the table for prompt tuning; only for an engine.",
    )  # fmt: skip
    # -- kept
    pp_size: StrictInt = no_effect(
        1, label="Pipeline stages", unit="stages", ge=1, le=64,
        help="The original never reads it. Several GPUs in CUDA_ID share every layer (tensor parallelism).",
    )  # fmt: skip
    per_channel: StrictBool = no_effect(
        False, label="Scales per channel", help="modelopt's SmoothQuant always has one weight scale per output channel."
    )
    per_token: StrictBool = no_effect(
        False,
        label="Scales per token",
        help="modelopt's SmoothQuant has one activation scale per Linear, from the text.",
    )
    per_group: StrictBool = no_effect(False, label="Scales per group", help=_BASE_ONLY)
    int8_kv_cache: StrictBool = no_effect(False, label="8-bit KV cache", help=_BASE_ONLY)
    kv_cache_dtype: Literal["int8", "fp8"] | None = no_effect(
        None, label="KV cache type", empty="as the model",
        help="The original never reads it, and the KV cache stays in the model's type here too.",
    )  # fmt: skip
    load_by_shard: StrictBool = no_effect(False, label="Load by shard", help="The original never reads it.")
    hidden_act: str = no_effect(
        "silu", label="Activation", help="The model's own config.json says it; a file cannot contradict it."
    )
    rotary_base: StrictFloat | StrictInt = no_effect(
        10000.0, label="Rotary base",
        help="The model's own config.json says it. 10000, the original's default, is wrong for Llama 3 and others.",
    )  # fmt: skip
    use_fused_mlp: StrictBool = no_effect(
        False, label="Fused MLP", help="TensorRT-LLM 1.2.1 decides this by itself and has no option of that name."
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_is_default(cls, values: Any) -> Any:
        return drop_empty(values)

    @model_validator(mode="after")
    def _fits_together(self) -> TensorRTLLMSettings:
        if not self.to_quantize and len(each(self.quant_method)) > 1:
            raise ProblemAt(
                "quant_method",
                f"found {', '.join(each(self.quant_method))} beside to_quantize: false, which makes one 16-bit export; "
                "leave quant_method out or set to_quantize to true",
            )
        for name in self.methods:
            method = METHODS[name]
            if self.BACKEND != "auto" and self.BACKEND not in method.modes:
                other = (
                    f"the {method.modes[0]} backend"
                    if method.modes[0] == PYTORCH
                    else (f"an engine of TensorRT-LLM {LEGACY_VERSION}")
                )
                fitting = ", ".join(m.name for m in METHODS.values() if self.BACKEND in m.modes)
                raise ProblemAt(
                    "BACKEND",
                    f"found {self.BACKEND!r} beside quant_method {name}, which runs only in {other}; set it to auto or "
                    f"{method.modes[0]}, or choose one of {fitting}",
                    self.BACKEND,
                )
            if name == "nvfp4" and self.dtype != "bfloat16":
                raise ProblemAt(
                    "dtype",
                    f"found {self.dtype!r} beside quant_method nvfp4, whose Blackwell kernels compute in bfloat16; set "
                    "it to bfloat16",
                    self.dtype,
                )
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods whose results the job makes; empty if it quantizes nothing."""
        return each(self.quant_method) if self.to_quantize else ()

    def mode(self, method: str | None) -> str:
        """The backend that runs a method's result, `pytorch` or `tensorrt`.

        Args:
            method: Its name; None: the 16-bit export.
        """
        if self.BACKEND != "auto":
            return self.BACKEND
        return METHODS[method].modes[0] if method else PYTORCH

    @property
    def builds_engine(self) -> bool:
        """Whether any of the results is built into an engine."""
        return any(self.mode(method) == ENGINE for method in self.methods or (None,))

    @property
    def calibration_size(self) -> Mapping[str, Any]:
        """How much calibration text the section asks for."""
        return {"SAMPLES": self.calib_size, "SEQUENCE_LENGTH": self.max_seq_length}
