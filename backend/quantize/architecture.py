"""Which transformer models can be streamed layer by layer, and where their parts are: read off the module tree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from backend.errors import ModelError
from backend.formats.config import EXPERT_KEYS
from backend.formats.skeleton import build_skeleton

SUPPORTED = (
    "Supported are dense decoder-only models whose layers are made of torch Linears: Llama, Mistral, Qwen2, Qwen3, "
    "Gemma 2 and 3, Phi-3, OPT, GPT-NeoX and others of that form."
)


@dataclass(frozen=True)
class Architecture:
    """A supported model without its weights.

    Attributes:
        name: Class name, e.g. `LlamaForCausalLM`.
        config: Its configuration.
        model: The module tree; all parameters are on the meta device.
        layers_path: Name of the list of decoder layers, e.g. `model.layers` or `gpt_neox.layers`.
        stored: Name in the module tree -> name in the checkpoint's files, where the two differ.
    """

    name: str
    config: PretrainedConfig
    model: PreTrainedModel
    layers_path: str
    stored: Mapping[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers."""
        layers = self.model.get_submodule(self.layers_path)
        assert isinstance(layers, nn.ModuleList)
        return layers

    @property
    def body(self) -> PreTrainedModel:
        """The model without its head: embeds tokens and runs the layers."""
        body = self.model.base_model
        assert isinstance(body, PreTrainedModel)
        return body

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: token ids lie below."""
        return int(_embedding(self.model).num_embeddings)

    @property
    def head(self) -> str | None:
        """Name of the output head, e.g. `lm_head`."""
        return _name_of(self.model, self.model.get_output_embeddings())

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """Linears of one layer, named inside it, e.g. `self_attn.q_proj`."""
        return {name: m for name, m in self.layers[index].named_modules() if isinstance(m, nn.Linear)}

    def stored_name(self, name: str) -> str:
        """What the checkpoint's files call a tensor of the module tree."""
        return self.stored.get(name, name)


def describe(config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16) -> Architecture:
    """Build the skeleton of a model and make sure that it can be streamed.

    Raises:
        ModelError: If the architecture is not supported; the message names it, says why, and what is supported.
    """
    name = (getattr(config, "architectures", None) or [type(config).__name__])[0]
    try:
        _check_config(config)
        model = build_skeleton(config, dtype)
        path = find_layers(model)
        embedding = _name_of(model, _embedding(model))
        if embedding is None or f"{embedding}.".startswith(f"{path}."):
            raise _Unsupported("its input embedding is not outside of the decoder layers")
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            raise _Unsupported(f"its output head is {type(model.get_output_embeddings()).__name__}, not a Linear")
        for index, layer in enumerate(model.get_submodule(path).children()):
            _check_layer(f"{path}.{index}", layer)
    except _Unsupported as reason:
        raise ModelError(f"{name} cannot be quantized: {reason}. {SUPPORTED}") from None
    return Architecture(name, config, model, path)


def find_layers(model: PreTrainedModel) -> str:
    """Name of the model's decoder layers: its only list of blocks with Linears, blocks inside blocks aside.

    Raises:
        _Unsupported: If there is none, more than one, or its blocks differ.
    """
    found: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and not inside and any(isinstance(m, nn.Linear) for m in module.modules()):
            found.append(name)
    if not found:
        conv = any(type(m).__name__ == "Conv1D" for m in model.modules())
        raise _Unsupported("its weights are Conv1D modules, not Linears" if conv else "it has no list of layers")
    if len(found) > 1:
        raise _Unsupported(f"it has several stacks of layers ({', '.join(found)})")
    kinds = sorted({type(layer).__name__ for layer in model.get_submodule(found[0]).children()})
    if len(kinds) > 1:
        raise _Unsupported(f"the layers in {found[0]} are of different kinds ({', '.join(kinds)})")
    return found[0]


class _Unsupported(Exception):
    """Why a model cannot be streamed."""


def _check_config(config: PretrainedConfig) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise _Unsupported("it is an encoder-decoder model")
    for key in EXPERT_KEYS:
        if (getattr(config, key, None) or 0) > 1:
            raise _Unsupported(f"it is a mixture of experts ({key} = {getattr(config, key)})")


def _check_layer(path: str, layer: nn.Module) -> None:
    """A layer's weights are those of Linears, besides vectors (norms, biases)."""
    for name, parameter in layer.named_parameters():
        if parameter.dim() > 2:
            raise _Unsupported(f"{path}.{name} has shape {tuple(parameter.shape)}, which is no Linear's weight")
    for name, buffer in layer.named_buffers():
        if buffer.is_meta:
            raise _Unsupported(f"{path}.{name} is a stored buffer; layers may hold parameters only")
    linears = [m for m in layer.modules() if isinstance(m, nn.Linear)]
    weights = {id(m.weight) for m in linears}
    other = [n for n, p in layer.named_parameters() if p.dim() == 2 and id(p) not in weights]
    if not linears or other:
        raise _Unsupported(f"{path} has {f'the weight {other[0]} outside of a Linear' if other else 'no Linear'}")


def _embedding(model: PreTrainedModel) -> nn.Embedding:
    embedding = model.get_input_embeddings()
    if not isinstance(embedding, nn.Embedding):
        raise _Unsupported(f"its input embedding is {type(embedding).__name__}, not an Embedding")
    return embedding


def _name_of(model: nn.Module, module: nn.Module | None) -> str | None:
    return next((name for name, m in model.named_modules() if m is module), None)
