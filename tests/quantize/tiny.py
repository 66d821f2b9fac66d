"""Small random models in folders, and the settings that fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from backend.formats.loader import load_model
from backend.formats.writer import CheckpointWriter
from backend.quantize import AwqSettings, QuantizationReport, quantize_awq

VOCABULARY = 96
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
SETTINGS = AwqSettings(group_size=32)


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
    return CONFIGS[kind](**(sizes | changes))


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


def quantize(
    source: Path,
    out: Path,
    settings: AwqSettings = SETTINGS,
    version: str = "GEMM",
    dtype: str | None = "float16",
    **kw: Any,
) -> QuantizationReport:
    writer = CheckpointWriter(out, source, version=version, dtype=dtype)
    report = quantize_awq(
        source, kw.pop("tokens", tokens()), settings, writer, dtype=kw.pop("dtype_", torch.float32), **kw
    )
    writer.finish()
    return report


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(tokens(2, 16, seed=5)).logits
