"""Small random models in folders, and a plain way to quantize them: rounding to nearest, straight to a writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order, drop_tied_head, is_layer_linear
from backend.formats.weight import QuantizedWeight
from backend.formats.writer import CheckpointWriter
from backend.quantize.recipe import PER_CHANNEL, Recipe, Scheme

VOCABULARY = 96
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "opt": OPTConfig,
    "gpt_neox": GPTNeoXConfig,
}
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT_SIZES = {"ffn_dim": 256, "word_embed_proj_dim": 128, "do_layer_norm_before": True}


def make_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model, saved in `folder`."""
    torch.manual_seed(0)
    sizes = SIZES | (OPT_SIZES if kind == "opt" else {}) | changes
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**sizes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.normal_(0.0, 0.08)
    model.to(dtype).save_pretrained(folder)
    return folder


def tokens(samples: int = 2, length: int = 20, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def random_weight(
    out: int, width: int, group_size: int, bits: int = 4, symmetric: bool = False, dtype: torch.dtype = torch.float16
) -> QuantizedWeight:
    g = torch.Generator().manual_seed(0)
    groups = 1 if group_size == PER_CHANNEL else width // group_size
    zero = torch.randint(0, 1 << bits, (out, groups), generator=g, dtype=torch.uint8)
    return QuantizedWeight(
        torch.randint(0, 1 << bits, (out, width), generator=g, dtype=torch.uint8),
        (torch.rand(out, groups, generator=g) + 0.01).to(dtype),
        torch.full_like(zero, 1 << (bits - 1)) if symmetric else zero,
        bits,
        symmetric,
    )


def rtn(weight: Tensor, scheme: Scheme, scale_dtype: torch.dtype) -> QuantizedWeight:
    """Rounding to nearest on the plain min/max grid."""
    out, width = weight.shape
    grouped = weight.float().view(out, 1 if scheme.group_size == PER_CHANNEL else width // scheme.group_size, -1)
    top, middle = (1 << scheme.bits) - 1, 1 << (scheme.bits - 1)
    if scheme.symmetric:
        scale = (grouped.abs().amax(-1) / (middle - 0.5)).to(scale_dtype)
        zero = torch.full_like(scale, middle, dtype=torch.float32)
    else:
        low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
        scale = ((high - low) / top).to(scale_dtype)
        zero = (-low / scale.float()).round().clamp(0, top)
    q = (grouped / scale.float().unsqueeze(-1)).round().add(zero.unsqueeze(-1)).clamp(0, top)
    return QuantizedWeight(q.view(out, width).byte(), scale, zero.byte(), scheme.bits, scheme.symmetric)


def stored(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder."""
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def write(source: Path, out: Path, recipe: Recipe, *, layout: str = "compressed-tensors", **options: Any) -> Path:
    """Quantize a folder as the pipeline does, but by rounding to nearest."""
    writer = CheckpointWriter(out, source, layout=layout, group_size=recipe.scheme.group_size, **options)
    kept: dict[str, str] = {}
    tensors = stored(source)
    for name in sorted(
        (t.name for t in drop_tied_head(read_headers(source), read_config_json(source))), key=artefact_order
    ):
        tensor, prefix = tensors[name], name.rpartition(".")[0]
        if name.endswith(".bias") and is_layer_linear(f"{prefix}.weight", tuple(tensors[f"{prefix}.weight"].shape)):
            weight = tensors[f"{prefix}.weight"]
            if prefix not in kept and not isinstance(_scheme(writer, recipe, prefix, weight), str):
                continue  # goes with its weight
        if not is_layer_linear(name, tuple(tensor.shape)):
            writer.add(name, tensor)
            continue
        scheme = _scheme(writer, recipe, prefix, tensor)
        if isinstance(scheme, str):
            kept[prefix] = scheme
            writer.add(name, tensor)
        else:
            writer.add_linear(prefix, rtn(tensor, scheme, writer.scale_dtype), tensors.get(f"{prefix}.bias"))
    return writer.finish(kept)


def _scheme(writer: CheckpointWriter, recipe: Recipe, prefix: str, weight: Tensor) -> Scheme | str:
    scheme = recipe.scheme_for(prefix, weight.shape[1])
    if isinstance(scheme, str):
        return scheme
    return writer.refusal(scheme, (weight.shape[0], weight.shape[1])) or scheme
