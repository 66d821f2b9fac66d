"""Loads a checkpoint folder, 16-bit or quantized, as a transformers model ready to run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from backend.errors import CheckpointError, ModelError
from backend.formats.additive_linear import additive_linear
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.modelopt_linear import ModeloptLinear, ModeloptWeight
from backend.formats.packed_int8 import PermutedLinear, packed_linear
from backend.formats.remote_code import remote_code_allowed
from backend.formats.size import TIED_HEADS
from backend.formats.skeleton import build_skeleton, match_tensors, read_config, state_of
from backend.formats.stored_linears import StoredLinears, quantization_of, stored_linears


def load_model(
    model_dir: Path | str,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    packed_codes: bool = False,
) -> PreTrainedModel:
    """Load a model folder; its config.json says whether and how its Linears are packed.

    Every tensor is read once, straight to its place; nothing is initialised at random. compressed-tensors formats
    other than packed integer weights go through `backend.formats.third_party`.

    Args:
        model_dir: Folder with config.json and safetensors.
        device: Where to put the model.
        dtype: Type to compute in; bfloat16 if None.
        packed_codes: Keep AQLM's codes packed on the CPU even where dequantising them once is faster: takes the least
            memory.

    Raises:
        ModelError: If the configuration or its quantization is not supported.
        CheckpointError: If files are broken, or tensors are missing, unexpected or of the wrong shape.
    """
    folder, device = Path(model_dir), torch.device(device)
    dtype = dtype or torch.bfloat16
    quantization = quantization_of(folder)
    packed = stored_linears(folder, quantization) if quantization else None
    files = {info.name: info.file for info in read_headers(folder)}
    if quantization and packed is None:
        from backend.formats.third_party import load_with_transformers  # needs a package that others do not

        return load_with_transformers(folder, quantization, device, dtype)
    model = build_skeleton(read_config(folder), dtype)
    state = state_of(model)
    prefixes = set(_packed_prefixes(files, packed)) if packed else set()
    places = match_tensors(model, _weight_names(files, prefixes, packed))
    with CheckpointReader(folder, files) as reader:
        linears = {stored.removesuffix(".weight"): name for name, stored in places.stored.items()}
        for prefix in sorted(prefixes):
            assert packed is not None
            place = linears.get(prefix)
            _place_packed(model, place, prefix, reader, state, packed, dtype, device, packed_codes)
        if places.missing:
            name = places.missing[0]
            raise CheckpointError(f"{folder}: tensor {name} of {type(model).__name__} is in none of its files.")
        for name, stored in places.stored.items():
            if stored in reader.unread:
                _place(model, name, reader.take(stored), state[name], dtype, device)
        for name in places.ignored:
            tensor = reader.take(name)
            if name in TIED_HEADS:
                _check_copy(folder, name, tensor.to(device, dtype), model)
        if reader.unread:
            names = sorted(reader.unread)
            raise CheckpointError(
                f"{folder} holds {len(names)} tensors that {type(model).__name__} does not have, first {names[0]}; "
                "config.json and the weights do not belong together."
            )
    model.tie_weights()
    nn.Module.to(model, device)  # the computed buffers
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(f"{folder}/generation_config.json is not valid: {str(error)[:500]}") from None
    return model


def load_tokenizer(model_dir: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with its chat template if it has one.

    Raises:
        ModelError: If there is none or it cannot be read without running foreign code.
    """
    read_config_json(model_dir)
    try:
        return AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=remote_code_allowed()
        )
    except Exception as error:  # the tokenizers package raises plain Exception for a broken file
        raise ModelError(f"The tokenizer of {model_dir} cannot be loaded: {str(error)[:500]}") from None


class CheckpointReader:
    """Tensors of a folder's safetensors files, memory-mapped; each is to be taken once.

    Args:
        folder: The checkpoint.
        files: Tensor name -> file name.
    """

    def __init__(self, folder: Path, files: dict[str, str]) -> None:
        self.unread = dict(files)
        self._folder = folder
        self._handles: dict[str, Any] = {}
        self._stack = ExitStack()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._handles.clear()
        self._stack.close()

    def take(self, name: str) -> Tensor:
        """One tensor, a view of the mapped file.

        Raises:
            CheckpointError: If the file cannot be opened.
        """
        file = self.unread.pop(name)
        try:
            if file not in self._handles:
                opened = safe_open(str(self._folder / file), framework="pt", device="cpu")
                self._handles[file] = self._stack.enter_context(opened)
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self._folder / file}: {name} cannot be read ({error}).") from None
        return tensor


def _packed_prefixes(files: dict[str, str], packed: StoredLinears) -> Iterator[str]:
    suffix = f".{packed.required[0]}"
    return (name.removesuffix(suffix) for name in files if name.endswith(suffix))


def _weight_names(files: dict[str, str], prefixes: set[str], packed: StoredLinears | None) -> Iterator[str]:
    """The names that the files would have without quantization."""
    parts = (*packed.required, *packed.optional) if packed else ()
    yield from (f"{prefix}.weight" for prefix in prefixes if "weight" in parts or f"{prefix}.weight" not in files)
    for name in files:
        prefix, _, part = name.rpartition(".")
        if prefix not in prefixes or part not in parts:
            yield name


def _place_packed(
    model: PreTrainedModel,
    name: str | None,
    prefix: str,
    reader: CheckpointReader,
    state: dict[str, Tensor],
    packed: StoredLinears,
    dtype: torch.dtype,
    device: torch.device,
    packed_codes: bool,
) -> None:
    """Put the packed Linear that the files call `prefix` where the module tree has `name`."""
    missing = [part for part in packed.required if f"{prefix}.{part}" not in reader.unread]
    module = (name or "").removesuffix(".weight")
    twice = "weight" not in packed.required and f"{prefix}.weight" in reader.unread
    if name is None or missing or twice or not isinstance(model.get_submodule(module), nn.Linear):
        reason = "is also stored unpacked" if twice else "is no Linear of this architecture"
        reason = f"lacks {', '.join(missing)}" if missing else reason
        raise CheckpointError(f"Packed weight {prefix} {reason}; the checkpoint is incomplete or of another model.")
    parts = (*packed.required, *(part for part in packed.optional if f"{prefix}.{part}" in reader.unread))
    stored = {part: reader.take(f"{prefix}.{part}").to(device) for part in parts}
    weight, order = packed.unpack(module, stored)
    if weight.shape != state[name].shape:
        raise CheckpointError(f"{prefix} unpacks to {weight.shape}; the model needs {tuple(state[name].shape)}.")
    bias = None
    if f"{module}.bias" in state:
        if f"{prefix}.bias" not in reader.unread:
            raise CheckpointError(f"Tensor {prefix}.bias is in none of the checkpoint's files.")
        bias = reader.take(f"{prefix}.bias")
        if bias.shape != state[f"{module}.bias"].shape:
            raise CheckpointError(
                f"{prefix}.bias has shape {tuple(bias.shape)}; the weight has {weight.shape[0]} rows."
            )
    if isinstance(weight, AdditiveWeight):
        linear = additive_linear(weight, bias, dtype=dtype, device=device, packed=packed_codes)
    elif isinstance(weight, ModeloptWeight):
        linear = ModeloptLinear(weight, bias, dtype=dtype, device=device)
    else:
        linear = packed_linear(weight, bias, dtype=dtype, device=device)
    model.set_submodule(module, linear if order is None else PermutedLinear(linear, order))


def _place(
    model: PreTrainedModel, name: str, tensor: Tensor, target: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}; config.json of {type(model).__name__} says {tuple(target.shape)}."
        )
    if target.is_floating_point() and (not tensor.is_floating_point() or tensor.element_size() < 2):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} holds {kind} codes, but nothing that says what they stand for; the checkpoint is incomplete, or "
            "its quantization is not the one that config.json names."
        )
    parent, _, leaf = name.rpartition(".")
    data = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    if isinstance(target, nn.Parameter):
        data = nn.Parameter(data, requires_grad=False)
    setattr(model.get_submodule(parent), leaf, data)


def _check_copy(folder: Path, name: str, head: Tensor, model: PreTrainedModel) -> None:
    """Some checkpoints with a tied head store the embeddings twice; two different ones are a contradiction."""
    embeddings = model.get_input_embeddings().weight
    if not isinstance(embeddings, Tensor) or not torch.equal(head, embeddings):
        raise CheckpointError(
            f"{folder}: {name} differs from the embeddings, but config.json says tie_word_embeddings; "
            "set it to false to keep both."
        )
