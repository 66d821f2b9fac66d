"""Random Llama checkpoints of any size, written layer by layer, so that making one needs little memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from backend.demo import MODEL_DIR

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
SPREAD = 0.02  # standard deviation of weights, transformers' own default


def write_model(folder: Path, shape: Mapping[str, int], seed: int = 0) -> Path:
    """Write a bfloat16 checkpoint with random weights, one file per decoder layer.

    The demo model's tokenizer goes with it: some quantizers refuse a folder without one.

    Args:
        folder: Made here; must not exist.
        shape: Values of `LlamaConfig`, see `shapes`.
        seed: Fixes the weights.
    """
    folder.mkdir(parents=True)
    fixed = {"max_position_embeddings": 2048, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1}
    config = LlamaConfig.from_dict({**shape, **fixed})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(MODEL_DIR / name, folder / name)
    generator = torch.Generator().manual_seed(seed)
    index: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(tensor_shapes(shape)):
        file = f"model-{number:05d}.safetensors"
        tensors = {name: _random(size, generator) for name, size in shapes.items()}
        save_file(tensors, str(folder / file), metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=1)
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    return folder


def _random(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)  # the weight of a norm
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, SPREAD, generator=generator)


def tensor_shapes(shape: Mapping[str, int]) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of each file: embeddings, every decoder layer, the rest."""
    width, inner, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    head = width // shape["num_attention_heads"]
    shared = head * shape["num_key_value_heads"]
    yield {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.self_attn.q_proj.weight": (width, width),
            f"{prefix}.self_attn.k_proj.weight": (shared, width),
            f"{prefix}.self_attn.v_proj.weight": (shared, width),
            f"{prefix}.self_attn.o_proj.weight": (width, width),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
        }
    yield {"model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}
