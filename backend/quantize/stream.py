"""Streams a model through memory: embeddings once, then one decoder layer at a time.

Holds one layer's weights plus the activations of all calibration tokens, in memory or on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import DataError
from backend.quantize.activations import MEMORY_LIMIT, Activations
from backend.quantize.architecture import Architecture
from backend.quantize.embed import Embedder, LayerCall
from backend.quantize.gram import best_dtype as best_dtype
from backend.quantize.weights import WeightFiles

MICROBATCH_TOKENS = 4096
PROBE_TOKENS = 64


@dataclass(frozen=True)
class _Part:
    """Samples that pass a layer together, (samples, longest of them), and how much of each is text."""

    tokens: Tensor
    mask: Tensor | None  # (samples, length), True where there is text; None: everywhere


class LayerStream:
    """The calibration activations on their way through the model.

    Args:
        architecture: The model without weights.
        weights: Its checkpoint.
        tokens: (samples, length), int64.
        lengths: Tokens of each sample that are text, (samples,); what follows is padding. None: all.
        device: Where layers run.
        dtype: Type of activations and of the weights in forward passes.
        microbatch: Samples per forward pass; None: as many as make 4096 tokens.
        folder: Where activations are kept for a later process, None if they need not be.
        memory_limit: Bytes of activations above which they live on disk.
        start: Layer to begin with; above 0 its inputs must be in `folder`.
        held_out: Samples at the end that form parts of their own, for validation.
        keep: Tokens whose hidden states before a layer are still there, as `sample`, after it has run.

    Attributes:
        sample: Parts of the inputs of the layer that has run last, (samples, length, width), on the CPU, and where
            they are text.
        training: Numbers of the parts that are not held out.
        held_out: Numbers of the parts that are.

    Raises:
        DataError: If tokens are empty, not two-dimensional, or outside the vocabulary.
    """

    def __init__(
        self,
        architecture: Architecture,
        weights: WeightFiles,
        tokens: Tensor,
        lengths: Tensor | None,
        device: torch.device,
        dtype: torch.dtype,
        *,
        microbatch: int | None = None,
        folder: Path | None = None,
        memory_limit: int = MEMORY_LIMIT,
        start: int = 0,
        held_out: int = 0,
        keep: int = 0,
    ) -> None:
        _check_tokens(tokens, lengths, architecture.vocabulary)
        self._architecture, self._weights = architecture, weights
        self.device, self.dtype = device, dtype
        self.layers = len(architecture.layers)
        split = len(tokens) - held_out
        training, validation = (
            _parts(tokens[rows], None if lengths is None else lengths[rows], microbatch)
            for rows in (slice(split), slice(split, None))
        )
        self._parts = training + validation
        self.training, self.held_out = range(len(training)), range(len(training), len(self._parts))
        self._calls: dict[tuple[int, int], list[LayerCall]] = {}
        self._keep = keep
        self.sample: list[tuple[Tensor, Tensor | None]] = []
        self._probe_length = min(PROBE_TOKENS, self._parts[0].tokens.shape[1])
        self._embed(folder, memory_limit, start)

    def _embed(self, folder: Path | None, memory_limit: int, start: int) -> None:
        with Embedder(self._architecture, self._weights, self.device, self.dtype) as embedder:
            probe = self._parts[0].tokens[:1, : self._probe_length]
            hidden, self._calls[(1, self._probe_length)] = embedder(probe)
            width = hidden.shape[-1]
            shapes = [(*part.tokens.shape, width) for part in self._parts]
            self.activations = Activations(shapes, self.dtype, folder, memory_limit)
            self._store = partial(Activations, shapes, self.dtype, folder, memory_limit)
            resumed = start > 0 and self.activations.restore(start)
            self.start = start if resumed else 0
            for number, part in enumerate(self._parts):
                shape = (part.tokens.shape[0], part.tokens.shape[1])
                if not resumed or shape not in self._calls:
                    hidden, self._calls[shape] = embedder(part.tokens)
                if not resumed:
                    self.activations.write(number, hidden, first=True)

    def call(self, index: int, hidden: Tensor) -> LayerCall:
        """What layer `index` is called with beside hidden states of this shape."""
        return self._calls[(hidden.shape[0], hidden.shape[1])][index]

    @contextmanager
    def layer(self, index: int) -> Iterator[nn.Module]:
        """Decoder layer `index` with its weights on the device; released at the end."""
        layer = self._architecture.layers[index]
        names = [name for name, _ in layer.named_parameters()]
        assign(layer, self.read(index, names, self.dtype))
        try:
            yield layer
        finally:
            _release(layer)

    def read(self, index: int, names: list[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Parameters of layer `index` from the checkpoint, by their names inside the layer."""
        stored = {name: self.stored_name(index, name) for name in names}
        tensors = self._weights.read(list(stored.values()), self.device, dtype)
        return {name: tensors[key] for name, key in stored.items()}

    def stored_name(self, index: int, name: str) -> str:
        """What the checkpoint calls a parameter of layer `index`."""
        return self._architecture.stored_name(f"{self.prefix(index)}.{name}")

    def prefix(self, index: int) -> str:
        """Full name of layer `index`, e.g. `model.layers.3`."""
        return f"{self._architecture.layers_path}.{index}"

    def stored_dtype(self, index: int, name: str) -> torch.dtype:
        """The type in which the checkpoint holds a parameter of layer `index`."""
        return self._weights.dtype(self.stored_name(index, name))

    def advance(self, index: int, layer: nn.Module) -> Iterator[Tensor | None]:
        """Run the layer over all activations and store its outputs in their place.

        Yields:
            Before each part runs: where it is text, (samples, length), or None for everywhere.
        """
        self.sample.clear()
        left = self._keep
        for number in range(len(self._parts)):
            mask = self.mask(number)
            yield mask
            if left > 0:
                self.sample.append((self.activations.read(number), mask))
                left -= self._parts[number].tokens.numel()
            hidden = self.inputs(number)
            self.activations.write(number, call_layer(layer, hidden, self.call(index, hidden)))
        self.activations.advance()

    def inputs(self, number: int) -> Tensor:
        """A part's hidden states before the current layer, (samples, length, width), on the device."""
        return self.activations.read(number).to(self.device)

    def mask(self, number: int) -> Tensor | None:
        """Where a part is text, (samples, length), on the device; None for everywhere."""
        mask = self._parts[number].mask
        return None if mask is None else mask.to(self.device)

    def store(self, name: str) -> Activations:
        """Room for other hidden states of the same parts, e.g. what a layer should answer."""
        return self._store(name=name)

    def probe(self) -> Tensor:
        """The first tokens' activations before the current layer, (1, up to 64, width), float32."""
        return self.activations.read(0)[:1, : self._probe_length].to(self.device, torch.float32)


def _check_tokens(tokens: Tensor, lengths: Tensor | None, vocabulary: int) -> None:
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise DataError(f"Calibration tokens have shape {tuple(tokens.shape)}; (samples, length) is expected.")
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise DataError(
            f"Calibration tokens go from {int(tokens.min())} to {int(tokens.max())}, but the model knows "
            f"{vocabulary}; was the text tokenized with another model's tokenizer?"
        )
    if lengths is not None and (
        lengths.shape != tokens.shape[:1] or int(lengths.min()) < 1 or int(lengths.max()) > tokens.shape[1]
    ):
        raise DataError(f"Lengths of {len(tokens)} samples must be 1 to {tokens.shape[1]} each, one per sample.")


def _parts(tokens: Tensor, lengths: Tensor | None, microbatch: int | None) -> list[_Part]:
    """Samples of like length together, so that little padding is computed."""
    if lengths is None:
        size = microbatch or max(1, MICROBATCH_TOKENS // tokens.shape[1])
        return [_Part(part, None) for part in tokens.split(size) if len(part)]
    order = lengths.argsort(descending=True, stable=True).tolist()
    parts: list[_Part] = []
    while order:
        longest = int(lengths[order[0]])
        size = microbatch or max(1, MICROBATCH_TOKENS // longest)
        rows, order = order[:size], order[size:]
        mask = torch.arange(longest) < lengths[rows, None]
        parts.append(_Part(tokens[rows, :longest], None if bool(mask.all()) else mask))
    return parts


def call_layer(layer: Callable[..., Any], hidden: Tensor, call: LayerCall) -> Tensor:
    """The layer's output hidden states; tensors among the arguments are cast to the type of `hidden`."""
    args = (_cast(value, hidden.dtype) for value in call.args)
    output = layer(hidden, *args, **{name: _cast(value, hidden.dtype) for name, value in call.kwargs.items()})
    return output[0] if isinstance(output, tuple) else output


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(dtype)
    if isinstance(value, tuple):
        return tuple(_cast(item, dtype) for item in value)
    if isinstance(value, dict):
        return {key: _cast(item, dtype) for key, item in value.items()}
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
