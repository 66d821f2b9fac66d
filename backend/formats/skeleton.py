"""Models without weights: the transformers configuration and module tree of a folder."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from backend.errors import ModelError
from backend.formats.config import read_config_json
from backend.formats.remote_code import remote_code_allowed

# SDPA leaves these out without a word; the model's own attention code applies them.
EAGER_ONLY_KEYS = ("attn_logit_softcapping",)
COMPUTED = re.compile(r"(?:^|\.)rotary_emb\.inv_freq$")
"""Tensors that old checkpoints hold and models compute for themselves."""
_building = threading.RLock()


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
        if "auto_map" in raw:  # a class of the model's own code, which `read_config_json` let through
            config = AutoConfig.from_pretrained(
                str(model_dir), local_files_only=True, trust_remote_code=remote_code_allowed()
            )
            vars(config).pop("quantization_config", None)
            return config
        return AutoConfig.for_model(**raw)
    except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError, StrictDataclassError) as error:
        raise ModelError(
            f"{model_dir}/config.json (model_type {model_type!r}) is not a valid configuration: {_first_line(error)}"
        ) from None


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model's modules with everything that a checkpoint holds on the meta device: structure, no memory.

    That is every parameter, and the buffers that belong to the model's state. The other buffers (rotary frequencies,
    the factor of Gemma's embedding) are real: the modules compute them as they are built.

    Raises:
        ModelError: If there is no causal language model for the configuration, or it cannot be built.
    """
    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    try:
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention_of(config),
                trust_remote_code=remote_code_allowed(),
            )
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ZeroDivisionError) as error:
        raise ModelError(
            f"{name} cannot be built as a causal language model: {_first_line(error)} "
            "Supported are decoder-only models like Llama, Mistral, Qwen2 and Qwen3."
        ) from None
    for module in model.modules():
        for key, buffer in list(module.named_buffers(recurse=False)):
            if key not in module._non_persistent_buffers_set:
                setattr(module, key, buffer.to("meta"))
    return model.eval()


def attention_of(config: PretrainedConfig) -> str:
    """The fastest attention of transformers that computes all of what the model asks for: `sdpa`, or `eager`."""
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    fused = getattr(model_class, "_supports_sdpa", False)
    return "sdpa" if fused and not any(getattr(config, key, None) for key in EAGER_ONLY_KEYS) else "eager"


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter moves to the meta device as its module takes it.

    What a constructor allocates for a weight is dropped before anything is written to it, so it costs no memory, and
    filling a meta tensor with random numbers costs no time. One thread at a time: the method is every module's.
    """

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        original(module, name, parameter)

    with _building:
        original = nn.Module.register_parameter
        nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a skeleton that a checkpoint has to hold, by name; a tied head is listed beside the embedding."""
    state: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return state | {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if buffer.is_meta}


@dataclass(frozen=True)
class TensorMap:
    """How the tensors of a checkpoint's files belong to a skeleton.

    Attributes:
        stored: Name in the module tree -> name in the files. Of tensors that are tied only the first in the tree.
        missing: Names in the module tree that no file has.
        ignored: Names in the files that the model does not read: what it computes itself, copies of a tied head.
        unexpected: Names in the files that the model does not know.
    """

    stored: dict[str, str]
    missing: list[str]
    ignored: list[str]
    unexpected: list[str]


def match_tensors(model: PreTrainedModel, names: Iterable[str]) -> TensorMap:
    """Find the place of every stored tensor, by the renaming rules of transformers.

    Files may name tensors as an older release of transformers did (`embed_out` of GPT-NeoX is `lm_head` today) or
    leave out the prefix of the model's body.

    Args:
        model: A skeleton.
        names: Of the tensors in the files.
    """
    state = state_of(model)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    computed = {name for name, buffer in model.named_buffers() if not buffer.is_meta}
    stored: dict[str, str] = {}
    ignored: list[str] = []
    unexpected: list[str] = []
    for name in sorted(names):
        place = name
        if name not in state:
            place, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if place in state:
            owner = first[id(state[place])]
            if owner in stored:  # a copy of a tied tensor; the owner's own entry counts
                ignored.append(name if place != owner else stored[owner])
            if owner not in stored or place == owner:
                stored[owner] = name
        elif name in computed or COMPUTED.search(name) or any(pattern.search(name) for pattern in optional):
            ignored.append(name)
        else:
            unexpected.append(name)
    missing = [name for name in dict.fromkeys(first.values()) if name not in stored]
    return TensorMap(stored, missing, ignored, unexpected)


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return " ".join(line.strip() for line in text[:3]) or type(error).__name__
