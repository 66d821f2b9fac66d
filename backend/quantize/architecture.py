"""Which transformer models can be streamed layer by layer, and where their parts are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from backend.errors import ModelError
from backend.formats.config import EXPERT_KEYS
from backend.formats.skeleton import build_skeleton

SUPPORTED = (
    "Supported are dense decoder-only models with their layers in model.layers, made of torch Linears: "
    "Llama, Mistral, Qwen2, Qwen3 and others of that form."
)
LAYERS = "model.layers"
EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"


@dataclass(frozen=True)
class Architecture:
    """A supported model without its weights.

    Attributes:
        name: Class name, e.g. `LlamaForCausalLM`.
        config: Its configuration.
        model: The module tree; all parameters are on the meta device.
    """

    name: str
    config: PretrainedConfig
    model: PreTrainedModel

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.model.get_submodule(LAYERS)
        assert isinstance(layers, nn.ModuleList)
        return layers

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Linears of one layer, named inside it, e.g. `self_attn.q_proj`."""
        return {name: m for name, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}


def describe(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """Build the skeleton of a model and make sure that it can be streamed.

    Raises:
        ModelError: If the architecture is not supported; the message names it, says why, and what is supported.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]

    def refuse(reason: str) -> ModelError:
        return ModelError(f"{name} cannot be quantized: {reason}. {SUPPORTED}")

    if getattr(config, "is_encoder_decoder", False):
        raise refuse("it is an encoder-decoder model")
    for key in EXPERT_KEYS:
        if (getattr(config, key, None) or 0) > 1:
            raise refuse(f"it is a mixture of experts ({key} = {getattr(config, key)})")
    model = build_skeleton(config, dtype)
    try:
        layers = model.get_submodule(LAYERS)
        model.get_submodule(EMBEDDING)
        model.get_submodule(FINAL_NORM)
    except AttributeError as error:
        kinds = {type(m).__name__ for m in model.modules()}
        extra = "its weights are Conv1D modules and " if "Conv1D" in kinds else ""
        raise refuse(f"{extra}its parts are named differently ({error})") from None
    if not isinstance(layers, nn.ModuleList) or len(layers) == 0:
        raise refuse(f"{LAYERS} is {type(layers).__name__} of length {len(list(layers.children()))}")
    for index, layer in enumerate(layers):
        large = {n: p for n, p in layer.named_parameters() if p.dim() > 2}
        if large:
            first, parameter = next(iter(large.items()))
            raise refuse(f"{LAYERS}.{index}.{first} has shape {tuple(parameter.shape)}, which is no Linear's weight")
        linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        weights = {id(m.weight) for m in linears}
        other = [n for n, p in layer.named_parameters() if p.dim() == 2 and id(p) not in weights]
        if not linears or other:
            raise refuse(
                f"{LAYERS}.{index} has {f'the weight {other[0]} outside of a Linear' if other else 'no Linear'}"
            )
    return Architecture(name, config, model)
