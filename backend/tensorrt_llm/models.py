"""Which models TensorRT-LLM 1.2.1 runs, by the architecture that their config.json names.

Sources: TensorRT-LLM 1.2, supported models of the PyTorch backend; nvidia-modelopt 0.47, decoder types of its
TensorRT-LLM checkpoints. Models with experts and models that see are left out: what quantizes here are dense decoders.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backend.errors import ConfigError
from backend.tensorrt_llm.methods import ENGINE, PYTORCH

PYTORCH_MODELS = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM",
    "Exaone4ForCausalLM", "NemotronForCausalLM",
)  # fmt: skip
DECODER_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen",
    "GemmaForCausalLM": "gemma",
    "Gemma2ForCausalLM": "gemma2",
    "Phi3ForCausalLM": "phi3",
    "GPTJForCausalLM": "gptj",
    "FalconForCausalLM": "falcon",
}
"""Architecture -> `decoder_type` of modelopt's TensorRT-LLM checkpoint."""


def architecture_of(config: Mapping[str, Any]) -> str:
    """The architecture that a config.json names; empty if it names none."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def supported(mode: str) -> tuple[str, ...]:
    """The architectures that a backend runs."""
    return PYTORCH_MODELS if mode == PYTORCH else tuple(DECODER_TYPES)


def check_model(config: Mapping[str, Any], mode: str, tp_size: int) -> None:
    """Refuse a model that the backend does not run, or cannot spread over that many GPUs.

    Args:
        config: Its config.json.
        mode: `pytorch` or `tensorrt`.
        tp_size: GPUs that share every layer.

    Raises:
        ConfigError: With the key, what was found, and what would work.
    """
    name = architecture_of(config)
    if name not in supported(mode):
        where = "TensorRT-LLM's PyTorch backend" if mode == PYTORCH else "engines of TensorRT-LLM"
        other = ENGINE if mode == PYTORCH else PYTORCH
        hint = f"; BACKEND {other} has this one" if name in supported(other) else ""
        raise ConfigError(
            f"found a {name or 'model of no named architecture'}; {where} run {', '.join(supported(mode))}{hint}",
            key="MODEL",
            value=name,
        )
    for key in ("num_attention_heads", "num_key_value_heads"):
        heads = config.get(key)
        if isinstance(heads, int) and heads % tp_size:
            fitting = [str(n) for n in (1, 2, 4, 8) if heads % n == 0]
            raise ConfigError(
                f"found {tp_size} GPUs, which share every layer evenly, and the model has {key} {heads}; name "
                f"{' or '.join(fitting)} GPUs",
                key="CUDA_ID",
                value=tp_size,
            )
