"""One pass of the calibration activations through a layer: its input groups and their Gram matrices."""

from __future__ import annotations

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
    grams: dict[InputGroup, Gram] = {}
    mask = _Mask()
    handles = []
    for group in groups:
        linear = layer.get_submodule(group.linears[0])
        assert isinstance(linear, nn.Linear)
        grams[group] = Gram(linear.in_features, stream.device)
        handles.append(linear.register_forward_pre_hook(_accumulate(grams[group], mask)))
    try:
        for mask.text in stream.advance(index, layer):
            pass
    finally:
        for handle in handles:
            handle.remove()
    for group, gram in grams.items():
        if not bool(torch.isfinite(gram.mean_abs).all() and torch.isfinite(gram.H.diagonal()).all()):
            raise ModelError(
                f"Layer {index}: the input of {group.linears[0]} is not finite, or its squares overflow, on the "
                "calibration text."
            )
    return grams


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


class _Mask:
    """Which tokens of the part that is running are text: (samples, length), or None for all."""

    text: Tensor | None = None


def _accumulate(gram: Gram, mask: _Mask) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        gram.add(x if mask.text is None else x.reshape(*mask.text.shape, -1)[mask.text])

    return hook
