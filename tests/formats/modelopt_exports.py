"""Exports of small random models, made by nvidia-modelopt itself, with the logits of the models they were made of."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Exaone4Config,
    LlamaConfig,
    NemotronConfig,
    PretrainedConfig,
    Qwen2Config,
)

from backend.tensorrt_llm.methods import METHODS
from tests.quantize.models import VOCABULARY

SIZES: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, type[PretrainedConfig]] = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "exaone4": Exaone4Config,
    "nemotron": NemotronConfig,
}
DECODERS = {"llama": "llama", "qwen2": "qwen"}
"""Architectures that modelopt also writes TensorRT-LLM's own checkpoints for."""


@dataclass
class Export:
    """One quantized model.

    Attributes:
        folder: The Hugging Face export.
        checkpoint: The TensorRT-LLM checkpoint, of `DECODERS` only.
        logits: Of the quantized model in memory, after modelopt made Linears that run as one share their scales.
        before: Of the 16-bit model.
        weights: What modelopt quantized: weights of the Linears with the smoothing factors in them, float64.
        source: Folder of the 16-bit model.
    """

    folder: Path
    checkpoint: Path
    logits: Tensor
    before: Tensor
    weights: dict[str, Tensor]
    source: Path


def ids(samples: int = 4, length: int = 32, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


def make_export(root: Path, method: str, kind: str = "llama", **changes: Any) -> Export:
    """Quantize a random float32 model by a method of the product and export it both ways."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of untested versions of transformers
        return _make_export(root, method, kind, **changes)


def _make_export(root: Path, method: str, kind: str, **changes: Any) -> Export:
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
    from modelopt.torch.export.unified_export_hf import requantize_resmooth_fused_llm_layers

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**(SIZES | changes)), dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.log_normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 0.3 if name.endswith("bias") else 0.08)
    model.save_pretrained(root / "source")
    tokens = ids()
    with torch.no_grad():
        before = model(tokens).logits
    wanted = copy.deepcopy(getattr(mtq, METHODS[method].modelopt))
    if METHODS[method].grouped:
        wanted["algorithm"] = {"method": "awq_lite", "alpha_step": 0.5}
    mtq.quantize(model, wanted, forward_loop=lambda m: m(tokens))
    if kind in DECODERS:
        export_tensorrt_llm_checkpoint(
            copy.deepcopy(model), decoder_type=DECODERS[kind], dtype=torch.float16, export_dir=root / "trt",
            inference_tensor_parallel=1, inference_pipeline_parallel=1,
        )  # fmt: skip
    requantize_resmooth_fused_llm_layers(model)
    weights = {
        name: module.weight.detach().double()
        for name, module in model.named_modules()
        if hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled
    }
    with torch.no_grad():
        logits = model(tokens).logits
    export_hf_checkpoint(model, dtype=torch.float32, export_dir=root / "hf")
    return Export(root / "hf", root / "trt", logits, before, weights, root / "source")
