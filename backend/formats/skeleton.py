"""Models without weights: the transformers configuration and module tree of a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from backend.errors import ModelError
from backend.formats.config import read_config_json


def read_config(model_dir: Path | str) -> PretrainedConfig:
    """The transformers configuration of a folder, without its `quantization_config`.

    Raises:
        ModelError: If config.json is missing, broken, unsafe, or of an architecture transformers does not know.
    """
    raw = read_config_json(model_dir)
    raw.pop("quantization_config", None)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{model_dir}/config.json has no model_type; give the folder of a transformers model.")
    try:
        return AutoConfig.for_model(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ModelError(
            f"{model_dir}/config.json (model_type {model_type!r}) is not a valid configuration: {_first_line(error)}"
        ) from None


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules with every parameter on the meta device: structure and shapes, no memory.

    Buffers that checkpoints do not hold (rotary frequencies) are real, computed by their own modules.

    Raises:
        ModelError: If there is no causal language model for the configuration, or it cannot be built.
    """
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{name} cannot be built as a causal language model: {_first_line(error)} "
            "Supported are decoder-only models like Llama, Mistral, Qwen2 and Qwen3."
        ) from None
    for path, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            _rebuild(model, path, module, config, name)
    return model.eval()


def _rebuild(model: nn.Module, path: str, module: nn.Module, config: PretrainedConfig, name: str) -> None:
    """Replace a module that computes its own buffers by one whose buffers are real."""
    try:
        model.set_submodule(path, type(module)(config=config).eval())
    except TypeError:
        raise ModelError(
            f"{name}: the buffers of {path} ({type(module).__name__}) are in no file and cannot be computed from the "
            "configuration alone; this architecture is not supported."
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join(line.strip() for line in text[:3]) or type(error).__name__
