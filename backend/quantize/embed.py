"""Embeds tokens and finds out what a model calls its decoder layers with, by running the model's own forward."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from backend.errors import DataError, ModelError
from backend.formats.skeleton import state_of
from backend.quantize.architecture import Architecture

if TYPE_CHECKING:
    from backend.quantize.weights import WeightFiles


@dataclass(frozen=True)
class LayerCall:
    """What a decoder layer is called with beside the hidden states.

    Attributes:
        args: Positional arguments after the hidden states.
        kwargs: Keyword arguments: masks, rotary embeddings, ...
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class Embedder:
    """The part of a model before its decoder layers.

    The model's own forward runs over recorders in place of its layers, so nothing is assumed here about positions,
    masks or rotary embeddings. Inside `with`, everything outside of the layers and the head is on the device; the
    layers' buffers, which no file holds, move there for good.

    Args:
        architecture: The model without weights.
        weights: Its checkpoint.
        device: Where to embed.
        dtype: Type of the weights and the hidden states.
    """

    def __init__(
        self, architecture: Architecture, weights: WeightFiles, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._architecture, self._weights = architecture, weights
        self._device, self._dtype = device, dtype
        self._recorders = [_Recorder(layer) for layer in architecture.layers]
        self._recorders[-1].last = True
        self._layers: nn.ModuleList | None = None
        self._replaced: dict[str, Tensor] = {}
        self._checked = False

    def __enter__(self) -> Embedder:
        architecture = self._architecture
        model = architecture.model
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    setattr(module, name, buffer.to(self._device))
        try:
            for name, placeholder in self._outside().items():
                stored = architecture.stored_name(name)
                tensor = self._weights.read([stored], self._device, self._dtype)[stored]
                self._put(name, nn.Parameter(tensor, False) if isinstance(placeholder, nn.Parameter) else tensor)
                self._replaced[name] = placeholder
            self._layers = architecture.layers
            model.set_submodule(architecture.layers_path, nn.ModuleList(self._recorders))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        if self._layers is not None:
            self._architecture.model.set_submodule(self._architecture.layers_path, self._layers)
            self._layers = None
        for name, placeholder in self._replaced.items():
            self._put(name, placeholder)
        self._replaced.clear()

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> tuple[Tensor, list[LayerCall]]:
        """Embed some samples.

        Args:
            tokens: (n, L), int64.

        Returns:
            The hidden states before the first layer, (n, L, width), on the device, and one `LayerCall` per layer. The
            calls depend on n and L alone, so those of one batch serve all batches of its shape.

        Raises:
            DataError: If L is beyond the learned positions of the model.
            ModelError: If more than hidden states flows between the layers, which streaming would leave out.
        """
        assert self._layers is not None, "call it inside `with`"
        limit = getattr(self._architecture.config, "max_position_embeddings", None)
        if limit is not None and tokens.shape[1] > limit and self._learns_positions():
            raise DataError(
                f"Calibration sequences have {tokens.shape[1]} tokens; {self._architecture.name} has learned "
                f"{limit} positions. Use sequences of at most {limit} tokens."
            )
        if not self._checked:
            other = (tokens + 1) % self._architecture.vocabulary
            for ours, theirs in zip(self._run(tokens)[1], self._run(other)[1], strict=True):
                if not (_equal(ours.args, theirs.args) and _equal(ours.kwargs, theirs.kwargs)):
                    raise self._refuse("its decoder layers read more of the tokens than the hidden states")
            self._checked = True
        return self._run(tokens)

    def _run(self, tokens: Tensor) -> tuple[Tensor, list[LayerCall]]:
        for returns_tuple in (self._recorders[0].returns_tuple, not self._recorders[0].returns_tuple):
            for recorder in self._recorders:
                recorder.reset(returns_tuple)
            with suppress(_AllLayersCalled):
                self._architecture.body(input_ids=tokens.to(self._device), use_cache=False)
            first = self._recorders[0].hidden
            if first is not None and all(recorder.hidden is first for recorder in self._recorders):
                calls = [recorder.call for recorder in self._recorders]
                for recorder in self._recorders:
                    recorder.reset(returns_tuple)
                return first, calls
        raise self._refuse("it changes the hidden states between its decoder layers")

    def _refuse(self, reason: str) -> ModelError:
        name = self._architecture.name
        return ModelError(f"{name} cannot be quantized: {reason}, so they cannot be run one by one.")

    def _outside(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the body, less the layers; tied tensors once."""
        architecture, model = self._architecture, self._architecture.model
        used = {id(module) for module in architecture.body.modules()} - {id(model.get_output_embeddings())}
        inside = f"{architecture.layers_path}."
        found: dict[int, tuple[str, Tensor]] = {}
        for name, tensor in state_of(model).items():
            if not name.startswith(inside) and id(model.get_submodule(name.rpartition(".")[0])) in used:
                found.setdefault(id(tensor), (name, tensor))
        return dict(found.values())

    def _put(self, name: str, tensor: Tensor) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self._architecture.model.get_submodule(parent), leaf, tensor)

    def _learns_positions(self) -> bool:
        body = self._architecture.body
        return any(isinstance(m, nn.Embedding) and m is not body.get_input_embeddings() for m in body.modules())


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same values."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or torch.equal(a, b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_equal(value, b[key]) for key, value in a.items())
    return type(a) is type(b) and bool(a == b)


class _AllLayersCalled(Exception):
    """Ends the forward: what follows the layers is not needed."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: notes what it is called with and hands its input on.

    Args:
        layer: Answers for whatever else the model wants to know of its layer, e.g. the kind of its attention.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.__dict__["_layer"] = layer  # past nn.Module, which would make it a child
        self.last = False
        self.reset(False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)

    def reset(self, returns_tuple: bool) -> None:
        """Forget the last call.

        Args:
            returns_tuple: Whether this model's layers return a tuple, of which it takes the first item.
        """
        self.returns_tuple = returns_tuple
        self.hidden: Tensor | None = None
        self.call = LayerCall()

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor]:
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        if self.last:
            raise _AllLayersCalled
        return (hidden_states,) if self.returns_tuple else hidden_states
