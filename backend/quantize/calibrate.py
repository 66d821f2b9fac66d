"""One pass of the calibration activations through a layer: its input groups and their Gram matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import ModelError
from backend.quantize.embed import LayerCall
from backend.quantize.gram import Gram
from backend.quantize.groups import GroupWatcher, InputGroup
from backend.quantize.stream import LayerStream, call_layer


def calibrate(stream: LayerStream, index: int, layer: nn.Module) -> dict[InputGroup, Gram]:
    """Advance the stream through the layer and collect the Gram matrix of every group of Linears.

    The next layer receives this layer's unquantized output.

    Raises:
        ModelError: If a Linear of the layer is never called, or sees inputs that are not finite.
    """
    hidden = stream.probe().to(stream.dtype)
    groups = find_groups(layer, hidden, stream.call(index, hidden))
    with GramWatcher(layer, groups, stream.device) as watcher:
        for watcher.mask in stream.advance(index, layer):
            pass
    watcher.check(f"Layer {index}")
    return watcher.grams


class GramWatcher:
    """Collects the Gram matrices of input groups while a layer runs.

    Args:
        layer: A decoder layer.
        groups: Its input groups, or some of them.
        device: Where the Gram matrices live.

    Attributes:
        grams: What was seen inside `with`.
        mask: Which tokens of the part that runs next are text, (samples, length); None for all.
        paused: Whether parts pass unseen.
    """

    def __init__(self, layer: nn.Module, groups: Sequence[InputGroup], device: torch.device) -> None:
        self._layer = layer
        self.grams = {group: Gram(_linear(layer, group).in_features, device) for group in groups}
        self.mask: Tensor | None = None
        self.paused = False
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GramWatcher:
        for group, gram in self.grams.items():
            self._handles.append(_linear(self._layer, group).register_forward_pre_hook(self._add_to(gram)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _add_to(self, gram: Gram) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            if not self.paused:
                gram.add(x if self.mask is None else x.reshape(*self.mask.shape, -1)[self.mask])

        return hook

    def check(self, where: str) -> None:
        """Refuse inputs that are not finite.

        Raises:
            ModelError: Naming `where` and the Linear.
        """
        for group, gram in self.grams.items():
            if not bool(torch.isfinite(gram.mean_abs).all() and torch.isfinite(gram.H.diagonal()).all()):
                raise ModelError(
                    f"{where}: the input of {group.linears[0]} is not finite, or its squares overflow, on the "
                    "calibration text."
                )


def _linear(layer: nn.Module, group: InputGroup) -> nn.Linear:
    linear = layer.get_submodule(group.linears[0])
    assert isinstance(linear, nn.Linear)
    return linear


def find_groups(layer: nn.Module, hidden: Tensor, call: LayerCall) -> list[InputGroup]:
    """The layer's input groups, seen in one forward pass.

    Raises:
        ModelError: If a Linear of the layer takes no part in it.
    """
    with GroupWatcher(layer) as watcher:
        call_layer(layer, hidden, call)
    groups = watcher.groups()
    called = {name for group in groups for name in group.linears}
    idle = [n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and n not in called]
    if idle:
        raise ModelError(f"{idle[0]} of {type(layer).__name__} is not used in a forward pass; it cannot be calibrated.")
    return groups
