"""What a TensorRT-LLM job's settings ask of the model, checked on its config.json and headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from backend.engines.configurations import Configuration
from backend.errors import ConfigError, ConfigErrors, ModelError
from backend.formats.bits import predicted_modelopt_bits
from backend.formats.modelopt_layout import ModeloptScheme
from backend.formats.size import predicted_modelopt_size
from backend.formats.trtllm_checkpoint import complete_config
from backend.schema import JobConfig, TensorRTLLMSettings
from backend.sources.quick_check import QuickFacts
from backend.tensorrt_llm.methods import ENGINE, METHODS
from backend.tensorrt_llm.models import check_model

SECTION = "llm.TensorRTLLM"
BLOCK_SIZES = (128, 64)


def check_fit(facts: QuickFacts, config: JobConfig) -> None:
    """Refuse what does not go with the model.

    Raises:
        ConfigErrors: With every problem, each at its key.
    """
    settings = config.algorithm_settings
    assert isinstance(settings, TensorRTLLMSettings)
    tp_size = gpu_count(config)
    problems: dict[tuple[str, str], ConfigError] = {}
    for name in settings.methods or (None,):
        mode = settings.mode(name)
        try:
            check_model(facts.config, mode, tp_size)
            if name is not None and METHODS[name].grouped:
                check_widths(facts.linears, settings.awq_block_size, tp_size if mode == ENGINE else 1)
            if mode == ENGINE:
                engine_lengths(facts.config, settings)
                _check_positions(facts.config)
        except ConfigError as error:
            problems.setdefault((error.key, error.detail), error)
    if problems:
        raise ConfigErrors(list(problems.values()))


def gpu_count(config: JobConfig) -> int:
    """The GPUs of CUDA_ID, which share every layer (tensor parallelism)."""
    return len(config.CUDA_ID.split(","))


def check_widths(shapes: Mapping[str, tuple[int, int]], group_size: int, tp_size: int) -> None:
    """Refuse Linears whose inputs the blocks of 4-bit weights do not divide: modelopt has no way to leave them.

    Args:
        shapes: Linear -> (out, in).
        group_size: Weights in a block.
        tp_size: GPUs that an engine's Linears are cut for: a block may not lie across the cut.

    Raises:
        ConfigError: With the first such Linear, and the block size that fits, if one does.
    """

    def misfits(size: int) -> list[str]:
        return [name for name, (_, width) in shapes.items() if width % (size * tp_size)]

    if not (found := misfits(group_size)):
        return
    width, fitting = shapes[found[0]][1], [size for size in BLOCK_SIZES if not misfits(size)]
    cut = f" / {tp_size} GPUs" if tp_size > 1 else ""
    what = f"set it to {fitting[0]}" if fitting else "choose quant_method fp8 or int8, which have no blocks"
    raise ConfigError(
        f"found {group_size}, which does not divide the {width}{cut} inputs of {found[0]} and {len(found) - 1} others "
        f"of {len(shapes)} Linears; {what}",
        key=f"{SECTION}.awq_block_size",
        value=group_size,
    )


def _check_positions(config: Mapping[str, Any]) -> None:
    """Refuse rotary positions that engines of TensorRT-LLM would compute in another way than the model.

    Raises:
        ConfigError: With what they can.
    """
    try:
        complete_config({}, config)
    except ModelError as error:
        raise ConfigError(error.message, key="MODEL") from None


def engine_lengths(config: Mapping[str, object], settings: TensorRTLLMSettings) -> tuple[int, int]:
    """Tokens of the longest prompt and answer; if the file gives neither, together no more than the model's positions.

    Args:
        config: The model's config.json.
        settings: The section.

    Raises:
        ConfigError: If the file gives more than the model has positions.
    """
    most, wanted = config.get("max_position_embeddings"), (settings.max_input_len, settings.max_output_len)
    if not isinstance(most, int) or sum(wanted) <= most:
        return wanted
    if settings.model_fields_set & {"max_input_len", "max_output_len"}:
        raise ConfigError(
            f"found {wanted[0]}, with max_output_len {wanted[1]} together {sum(wanted)} tokens; the model has {most} "
            f"positions: make the sum at most {most}",
            key=f"{SECTION}.max_input_len",
            value=wanted[0],
        )
    return most // 2, most - most // 2


def predicted_exports(facts: QuickFacts, planned: Sequence[Configuration]) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of each export's weight files, and bits per quantized weight, by the configuration's name."""
    sizes, bits = {}, {}
    for one in planned:
        if (name := one.request["method"]) is None:
            continue  # nothing is quantized
        scheme = ModeloptScheme(METHODS[name].quant_algo, one.request["group_size"] or BLOCK_SIZES[0])
        sizes[one.name] = predicted_modelopt_size(facts.headers, facts.config, scheme, dtype=one.request["dtype"])
        bits[one.name] = predicted_modelopt_bits(facts.headers, scheme)
    return sizes, bits
