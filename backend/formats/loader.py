"""Loads a checkpoint folder, 16-bit or AutoAWQ, as a transformers model ready to run."""

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
from backend.formats.autoawq import VERSIONS, unpack
from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.skeleton import build_skeleton, read_config

PACKED_PARTS = ("qweight", "qzeros", "scales")


def load_model(
    model_dir: Path | str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """Load a model folder; its config.json says whether its Linears are AutoAWQ-packed.

    Every tensor is read once, straight to its place; nothing is initialised at random.

    Args:
        model_dir: Folder with config.json and safetensors.
        device: Where to put the model.
        dtype: Type to compute in; bfloat16 if None.

    Raises:
        ModelError: If the configuration or its quantization is not supported.
        CheckpointError: If files are broken, or tensors are missing, unexpected or of the wrong shape.
    """
    folder, device = Path(model_dir), torch.device(device)
    dtype = dtype or torch.bfloat16
    quantization = _quantization(folder)
    model = build_skeleton(read_config(folder), dtype)
    files = {info.name: info.file for info in read_headers(folder)}
    expected: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    expected |= {name: buffer for name, buffer in model.named_buffers() if buffer.is_meta}
    tied = _tied_head(model)
    with CheckpointReader(folder, files) as reader:
        if quantization:
            for prefix in _packed_prefixes(files):
                _place_packed(model, prefix, reader, expected, quantization, dtype, device)
        for name, target in expected.items():
            if name == tied:
                continue
            if name in reader.unread:
                _place(model, name, reader.take(name), target, dtype, device)
            else:
                raise CheckpointError(f"{folder}: tensor {name} of {type(model).__name__} is in none of its files.")
        if tied is not None and tied in reader.unread:
            _check_copy(folder, reader.take(tied).to(device, dtype), model)
        if reader.unread:
            names = sorted(reader.unread)
            raise CheckpointError(
                f"{folder} holds {len(names)} tensors that {type(model).__name__} does not have, first {names[0]}; "
                "config.json and the weights do not belong together."
            )
    model.tie_weights()
    nn.Module.to(model, device)  # the computed buffers
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model


def load_tokenizer(model_dir: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, with its chat template if it has one.

    Raises:
        ModelError: If there is none or it cannot be read without running foreign code.
    """
    read_config_json(model_dir)
    try:
        return AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"The tokenizer of {model_dir} cannot be loaded: {error}") from None


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


def _quantization(folder: Path) -> dict[str, Any] | None:
    """The checked `quantization_config`, or None for a 16-bit model."""
    found = read_config_json(folder).get("quantization_config")
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method != "awq":
        raise ModelError(f"{folder} is quantized with {method!r}; 16-bit models and AutoAWQ checkpoints can be loaded.")
    version = str(found.get("version", "gemm")).upper()
    bits, group_size = found.get("bits"), found.get("group_size")
    if version not in VERSIONS or bits != 4 or not isinstance(group_size, int) or group_size < 1:
        raise ModelError(
            f"{folder}/config.json: AutoAWQ version {version!r}, bits {bits!r}, group_size {group_size!r}; "
            "supported are GEMM and GEMV with 4 bits and a positive group size."
        )
    return {"version": version, "group_size": group_size}


def _packed_prefixes(files: dict[str, str]) -> Iterator[str]:
    return (name.removesuffix(".qweight") for name in files if name.endswith(".qweight"))


def _place_packed(
    model: PreTrainedModel,
    prefix: str,
    reader: CheckpointReader,
    expected: dict[str, Tensor],
    quantization: dict[str, Any],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    target = expected.pop(f"{prefix}.weight", None)
    missing = [part for part in PACKED_PARTS if f"{prefix}.{part}" not in reader.unread]
    if target is None or missing or not isinstance(model.get_submodule(prefix), nn.Linear):
        reason = f"lacks {', '.join(missing)}" if missing else "is no Linear of this architecture"
        raise CheckpointError(f"Packed weight {prefix} {reason}; the checkpoint is incomplete or of another model.")
    tensors = {part: reader.take(f"{prefix}.{part}").to(device) for part in PACKED_PARTS}
    weight = unpack(tensors, quantization["version"], quantization["group_size"])
    if weight.q.shape != target.shape:
        raise CheckpointError(f"{prefix} unpacks to {tuple(weight.q.shape)}; the model needs {tuple(target.shape)}.")
    bias = None
    if expected.pop(f"{prefix}.bias", None) is not None:
        if f"{prefix}.bias" not in reader.unread:
            raise CheckpointError(f"Tensor {prefix}.bias is in none of the checkpoint's files.")
        bias = reader.take(f"{prefix}.bias")
    model.set_submodule(prefix, PackedInt4Linear(weight, bias, dtype=dtype, device=device))


def _place(
    model: PreTrainedModel, name: str, tensor: Tensor, target: Tensor, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != target.shape:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}; config.json of {type(model).__name__} says {tuple(target.shape)}."
        )
    parent, _, leaf = name.rpartition(".")
    data = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
    if isinstance(target, nn.Parameter):
        data = nn.Parameter(data, requires_grad=False)
    setattr(model.get_submodule(parent), leaf, data)


def _check_copy(folder: Path, head: Tensor, model: PreTrainedModel) -> None:
    """Some checkpoints with a tied head store the embeddings twice; two different ones are a contradiction."""
    embeddings = model.get_input_embeddings().weight
    if not isinstance(embeddings, Tensor) or not torch.equal(head, embeddings):
        raise CheckpointError(
            f"{folder}: lm_head.weight differs from the embeddings, but config.json says tie_word_embeddings; "
            "set it to false to keep both."
        )


def _tied_head(model: PreTrainedModel) -> str | None:
    """Name of the output head's weight if it is the embedding itself."""
    return "lm_head.weight" if getattr(model.config, "tie_word_embeddings", False) else None
