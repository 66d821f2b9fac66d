"""A small random model in a folder, and one call of the llm-compressor program on it."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from backend.engines.llm_compressor import quantize
from backend.event_stream import EventWriter
from backend.formats.loader import load_model
from backend.schema.llmcompressor import LLMCompressorSettings

VOCABULARY = 96
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def make_model(folder: Path, **changes: Any) -> Path:
    """A random Llama in bfloat16 whose channels are uneven, as AWQ and SmoothQuant expect them."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(LlamaConfig(**(sizes | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(torch.empty_like(parameter).log_normal_(0.0, 0.5))
            else:
                parameter.normal_(0.0, 0.04 if "layers" in name else 0.08)
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"clean_up_tokenization_spaces": false}\n')
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def scramble(model: Path, folder: Path) -> Path:
    """The same model with the inputs of every Linear in another order: a checkpoint that comes back wrong."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in loaded.named_parameters():
            if "layers" in name and parameter.dim() == 2:
                parameter.copy_(parameter[:, torch.randperm(parameter.shape[1])])
    loaded.save_pretrained(folder)
    return folder


def random_tokens(samples: int, length: int = 32, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def write_tokens(path: Path, tokens: torch.Tensor, lengths: torch.Tensor | None = None) -> Path:
    save_file({"tokens": tokens, **({} if lengths is None else {"lengths": lengths})}, str(path))
    return path


def compress(model: Path, tokens: Path, out: Path, section: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    """Run the program; its result with `folder`, `events` and the configuration's own entry as `made`."""
    settings = LLMCompressorSettings.model_validate(section)
    stream = io.StringIO()
    request = {
        "model_dir": str(model), "tokens_file": str(tokens), "out_dir": str(out), "device": "cpu", "seed": seed,
        "configurations": [{"name": settings.label, "label": settings.label, "settings": settings.model_dump()}],
    }  # fmt: skip
    with patch.dict(os.environ):  # the program sets variables for its own process
        result = quantize(request, EventWriter(stream))
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    return {**result, "made": result["results"][0], "folder": out / settings.label, "events": events}


def logits(folder: Path) -> torch.Tensor:
    """Logits of a checkpoint as transformers reads it, on text it was not calibrated with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
    with torch.no_grad():
        return model(random_tokens(4, seed=7)).logits.float()


def own_logits(folder: Path) -> torch.Tensor:
    """The same as Quantdeck's reader, which evaluates and chats, computes them."""
    with torch.no_grad():
        return load_model(folder)(random_tokens(4, seed=7)).logits.float()


def mean_kl(base: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL divergence of the next-token distributions, in nats."""
    p, q = base.log_softmax(-1), other.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
