"""From a job file to the plan that is run in TensorRT-LLM. Imports no torch: checks before the start read plans too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.engines.configurations import Configuration
from backend.schema import JobConfig, TensorRTLLMSettings
from backend.tensorrt_llm.fit import engine_lengths, gpu_count

GPTQ_WINDOW = 512
"""Tokens of a window of the guides' protocol; an engine for shorter prompts cannot measure it."""


def fields_of(
    config: JobConfig, configuration: Configuration, model: Mapping[str, Any], *, has_text: bool
) -> dict[str, Any]:
    """A `RunPlan`'s fields without its folders.

    Args:
        config: The job.
        configuration: One of its results.
        model: The model's config.json.
        has_text: Whether there is a text for perplexity.

    Raises:
        ConfigError: If the file's lengths do not go with the model.
    """
    settings, bench = config.algorithm_settings, config.BENCHMARK
    assert isinstance(settings, TensorRTLLMSettings)
    longest_prompt, longest_answer = engine_lengths(model, settings)
    return {
        "method": configuration.request["method"],
        "mode": configuration.request["mode"],
        "dtype": settings.dtype,
        "tp_size": gpu_count(config),
        "max_batch_size": settings.max_batch_size,
        "max_input_len": longest_prompt,
        "max_output_len": longest_answer,
        "max_beam_width": settings.max_beam_width,
        "max_num_tokens": settings.max_num_tokens,
        "max_prompt_embedding_table_size": settings.max_prompt_embedding_table_size,
        "kv_cache_fraction": settings.KV_CACHE_FRACTION,
        "prompt_tokens": bench.PROMPT_TOKENS,
        "new_tokens": bench.NEW_TOKENS,
        "requests": settings.REQUESTS,
        "concurrency": settings.CONCURRENCY,
        "perplexity": config.EVALUATION.ENABLED and has_text and longest_prompt >= GPTQ_WINDOW,
    }
