"""What a decoder layer gets and what it should answer: its calibration inputs and the dense layer's outputs to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from backend.errors import ModelError
from backend.quantize.activations import Activations
from backend.quantize.stream import LayerStream, call_layer


class BlockData:
    """Inputs and targets of one layer, part by part, in memory or on disk.

    Errors are relative: squared error over the energy of what the dense layer adds to its input, so that a large
    residual stream flatters no layer. Padding counts nowhere.

    Args:
        stream: Has the inputs.
        index: Position of the layer.
        targets: Where the outputs of the dense layer go.
    """

    def __init__(self, stream: LayerStream, index: int, targets: Activations) -> None:
        self._stream, self._index, self._targets = stream, index, targets
        self._signal: dict[int, float] = {}
        self._tokens: dict[int, int] = {}
        self._samples: dict[int, int] = {}
        self.training, self.held_out = stream.training, stream.held_out

    @property
    def judged(self) -> range:
        """The parts on which the layer is judged: those held out, or all if none are."""
        return self.held_out or self.training

    def record(self, layer: nn.Module, number: int) -> None:
        """Run the dense layer on a part and keep its output as the target."""
        hidden, output = self._stream.inputs(number), self.run(layer, number)
        self._targets.write(number, output, first=True)
        added = self._text(number, output.float() - hidden.float())
        self._signal[number] = float(added.square().sum())
        self._tokens[number], self._samples[number] = len(added), len(hidden)

    def check(self) -> None:
        """Refuse targets that are not finite.

        Raises:
            ModelError: Naming the layer.
        """
        if not all(map(math.isfinite, self._signal.values())):
            raise ModelError(
                f"Layer {self._index}: its outputs on the calibration text are not finite, or their squares overflow, "
                f"in {str(self._stream.dtype).removeprefix('torch.')}."
            )

    def run(self, layer: nn.Module, number: int) -> Tensor:
        """The layer's output to a part."""
        hidden = self._stream.inputs(number)
        return call_layer(layer, hidden, self._stream.call(self._index, hidden))

    def squared_error(self, layer: nn.Module, number: int) -> Tensor:
        """Sum of (output - target)^2 over a part's text, float32, differentiable.

        A float32 layer computes its products in bfloat16 where the stream has 16 bits; all else stays float32.
        """
        device, dtype = self._stream.device, next(layer.parameters()).dtype
        hidden = self._stream.inputs(number).to(dtype)
        target = self._targets.read(number).to(device, torch.float32)
        mixed = dtype == torch.float32 and self._stream.dtype.itemsize == 2
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            output = call_layer(layer, hidden, self._stream.call(self._index, hidden))
        return self._text(number, output.float() - target).square().sum()

    def relative_error(self, layer: nn.Module, numbers: Iterable[int]) -> float:
        """Squared error of the layer's output over the energy of what the dense layer adds, over some parts."""
        with torch.no_grad():
            errors = {number: float(self.squared_error(layer, number)) for number in numbers}
        return sum(errors.values()) / max(sum(self._signal[number] for number in errors), 1e-30)

    def batches(self, order: Iterable[int], size: int) -> Iterator[list[int]]:
        """Parts in this order, gathered until they make `size` sequences; the last ones may make fewer."""
        batch: list[int] = []
        for number in order:
            batch.append(number)
            if sum(self._samples[n] for n in batch) >= size:
                yield batch
                batch = []
        if batch:
            yield batch

    def unit(self, numbers: Iterable[int]) -> float:
        """What the squared error of some training parts is divided by to be a relative one.

        Its energy per token is that of all training parts, so that every token weighs the same in every batch.
        """
        per_token = sum(self._signal[n] for n in self.training) / sum(self._tokens[n] for n in self.training)
        return max(per_token * sum(self._tokens[n] for n in numbers), 1e-30)

    def _text(self, number: int, values: Tensor) -> Tensor:
        """(samples, length, width) -> (tokens of text, width)."""
        mask = self._stream.mask(number)
        return values.flatten(0, 1) if mask is None else values[mask]
