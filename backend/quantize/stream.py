"""Streams a model through memory: embeddings once, then one decoder layer at a time.

Holds one layer's weights plus the activations of all calibration tokens (in CPU memory, in the compute type).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from backend.errors import CheckpointError, DataError
from backend.formats.headers import read_headers
from backend.quantize.architecture import EMBEDDING, FINAL_NORM, LAYERS, Architecture
from backend.quantize.groups import weight_of

MICROBATCH_TOKENS = 4096
PROBE_TOKENS = 64
STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """Reads tensors of a checkpoint by name; a file is mapped only while it is read.

    Args:
        model_dir: Folder with safetensors.
    """

    def __init__(self, model_dir: Path) -> None:
        self._folder = model_dir
        self._stored = {info.name: info for info in read_headers(model_dir)}

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return STORED_DTYPES[self._stored[name].dtype]

    def read(self, names: list[str], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copies of the named tensors on a device, cast to `dtype` (None: as stored).

        Raises:
            CheckpointError: If a file has become unreadable.
        """
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored[name].file for name in names}):
            path = self._folder / file
            try:
                with safe_open(str(path), framework="pt", device="cpu") as mapped:
                    for name in (n for n in names if self._stored[n].file == file):
                        stored = mapped.get_tensor(name)
                        tensors[name] = stored.to(device, dtype or stored.dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        return tensors


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and hands its input on."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert not args, "decoder layers take everything but the hidden states by keyword"
        self.arguments = kwargs
        return hidden_states


class LayerStream:
    """The calibration activations on their way through the model.

    The model's own forward, run over recorders in place of its layers, embeds the tokens and gives each layer's
    arguments (masks, rotary embeddings), so nothing about them is assumed here.

    Args:
        architecture: The model without weights.
        weights: Its checkpoint.
        tokens: (samples, length), int64.
        device: Where layers run.
        dtype: Type of activations and of the weights in forward passes.
        microbatch: Samples per forward pass; None: as many as make 4096 tokens.

    Raises:
        DataError: If tokens are empty, not two-dimensional, or outside the vocabulary.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: WeightFiles,
        tokens: Tensor,
        device: torch.device,
        dtype: torch.dtype,
        microbatch: int | None = None,
    ) -> None:
        vocabulary = weight_of(architecture.model, EMBEDDING).shape[0]
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise DataError(f"Calibration tokens have shape {tuple(tokens.shape)}; (samples, length) is expected.")
        if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
            raise DataError(
                f"Calibration tokens go from {int(tokens.min())} to {int(tokens.max())}, but the model knows "
                f"{vocabulary}; was the text tokenized with another model's tokenizer?"
            )
        self._architecture, self._weights = architecture, weights
        self.device, self.dtype = device, dtype
        self.layers = len(architecture.layers)
        self._size = microbatch or max(1, MICROBATCH_TOKENS // tokens.shape[1])
        self._arguments: dict[tuple[int, int], list[dict[str, Any]]] = {}
        self._probe_length = min(PROBE_TOKENS, tokens.shape[1])
        self.parts = self._embed(tokens)

    def _embed(self, tokens: Tensor) -> list[Tensor]:
        model = self._architecture.model
        layers, norm = model.get_submodule(LAYERS), model.get_submodule(FINAL_NORM)
        recorders = [_Recorder() for _ in self._architecture.layers]
        name = f"{EMBEDDING}.weight"
        try:
            assign(model, self._weights.read([name], self.device, self.dtype))
            model.set_submodule(LAYERS, nn.ModuleList(recorders))
            model.set_submodule(FINAL_NORM, nn.Identity())
            body = model.get_submodule("model").to(self.device)
            self._run_recorders(body, recorders, tokens[:1, : self._probe_length])
            return [self._run_recorders(body, recorders, part) for part in tokens.split(self._size)]
        finally:
            model.set_submodule(LAYERS, layers)
            model.set_submodule(FINAL_NORM, norm)
            _release(model.get_submodule(EMBEDDING))

    def _run_recorders(self, body: nn.Module, recorders: list[_Recorder], tokens: Tensor) -> Tensor:
        hidden: Tensor = body(input_ids=tokens.to(self.device), use_cache=False).last_hidden_state
        self._arguments[(tokens.shape[0], tokens.shape[1])] = [r.arguments for r in recorders]
        return hidden.to("cpu")

    def arguments(self, index: int, hidden: Tensor) -> dict[str, Any]:
        """What layer `index` is called with beside hidden states of this shape."""
        return self._arguments[(hidden.shape[0], hidden.shape[1])][index]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on the device; released at the end."""
        layer = self._architecture.layers[index]
        prefix = f"{LAYERS}.{index}."
        names = [prefix + name for name, _ in layer.named_parameters()]
        tensors = self._weights.read(names, self.device, self.dtype)
        assign(layer, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
        del tensors
        try:
            yield layer
        finally:
            _release(layer)

    def advance(self, index: int, layer: nn.Module) -> None:
        """Run the layer over all activations and keep its outputs in their place."""
        for number, part in enumerate(self.parts):
            hidden = part.to(self.device)
            self.parts[number] = call_layer(layer, hidden, self.arguments(index, hidden)).to("cpu")

    def probe(self) -> Tensor:
        """The first tokens' activations before the current layer, (1, up to 64, width), float32."""
        return self.parts[0][:1, : self._probe_length].to(self.device, torch.float32)


def call_layer(layer: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The layer's output hidden states; tensors among the arguments are cast to the type of `hidden`."""
    output = layer(hidden, **{name: _cast(value, hidden.dtype) for name, value in arguments.items()})
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    return value


def assign(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put tensors in the place of a module's parameters of these names."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(parent), leaf, nn.Parameter(tensor, requires_grad=False))


def _release(module: nn.Module) -> None:
    """Drop the weights: back to the meta device."""
    for submodule in module.modules():
        for name, parameter in list(submodule.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(submodule, name, nn.Parameter(empty, requires_grad=False))


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where it is computed natively, else float32."""
    if device.type != "cpu":
        return torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32
