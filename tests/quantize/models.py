"""Small random models of all the architectures that the tests cover, in memory and in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 96
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "phi3": Phi3Config,
    "opt": OPTConfig,
    "gpt_neox": GPTNeoXConfig,
}
KINDS = tuple(CONFIGS)
GEMMA = {"query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OWN_KEYS: dict[str, dict[str, Any]] = {
    "gemma2": GEMMA | {"attn_logit_softcapping": 2.0},
    "gemma3": GEMMA,
    "phi3": {"pad_token_id": 0},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
}


def config(kind: str = "llama", **changes: Any) -> PretrainedConfig:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if kind in ("opt", "gpt_neox"):
        del sizes["num_key_value_heads"], sizes["head_dim"]
    return CONFIGS[kind](**(sizes | OWN_KEYS.get(kind, {}) | changes))


def make_model(
    folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes: Any
) -> Path:
    """A random model with uneven input channels (which is what AWQ is about), saved in `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(kind, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.empty_like(parameter).log_normal_(0.0, 1.0))
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.08)
                if "up_proj" in name or "v_proj" in name:
                    parameter.mul_(torch.empty(parameter.shape[0], 1).log_normal_(0.0, 0.7))
    model.to(dtype).save_pretrained(folder)
    return folder


def tokens(samples: int = 6, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))
