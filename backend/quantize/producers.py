"""Finds the Linear whose output rows, scaled, scale the input columns of another: found by trying, not by names.

Take o_proj: its input is a mixture over tokens of v_proj's output, so dividing a row of v_proj divides one column
of that input, in every query head that shares the row. Nothing is assumed about heads or about how q, k and v lie
in a fused weight: the outputs of the Linears called so far are replaced by random numbers, some rows of one of them
are multiplied by known factors, and the columns of the consumer's input must each grow by exactly one of these
factors for every token. The factors are digits, so that a few runs tell which row is behind which column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import gcd

import torch
from torch import Tensor, nn

from backend.quantize.fold import Fold, find_fold
from backend.quantize.groups import InputGroup

LEVELS = 2.0 ** torch.linspace(0.5, 2.0, 16)  # neighbours are 7% apart, 1 is none of them
TOLERANCE = 1e-3  # float32 through attention stays well below

Run = Callable[[], Tensor]
"""Runs the layer once on some hidden states in float32; its result is not used."""


class FoldFinder:
    """Where the scales of a model's layers can go.

    What a layer's code does with a Linear's output is the same in all layers of one form, so it is tried out in the
    first of them and remembered. `verify` still checks every layer.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], Fold | None] = {}

    def find(self, layer: nn.Module, groups: Sequence[InputGroup], run: Run) -> dict[InputGroup, Fold | None]:
        """The fold of each group of a layer, None where there is none.

        Args:
            layer: Its weights are float32.
            groups: All of its groups, in the order of their calls.
            run: Runs the layer once in float32, at best on some dozens of tokens.
        """
        form = (type(layer), *((name, tuple(p.shape)) for name, p in layer.named_parameters()))
        folds: dict[InputGroup, Fold | None] = {}
        for index, group in enumerate(groups):
            folds[group] = find_fold(layer, group)
            if folds[group] is None:
                key = (*form, group)
                if key not in self._known:
                    before = [name for earlier in groups[:index] for name in earlier.linears]
                    self._known[key] = find_producer(layer, group, before, run)
                folds[group] = self._known[key]
        return folds


@torch.no_grad()
def find_producer(layer: nn.Module, group: InputGroup, before: Sequence[str], run: Run) -> Fold | None:
    """The rows of an earlier Linear that carry the scales of a group's input, or None.

    Args:
        layer: Its weights are float32.
        group: Linears that share the input.
        before: Linears that may have been called before them, in the order of their calls.
        run: Runs the layer once in float32.
    """
    consumer = layer.get_submodule(group.linears[0])
    assert isinstance(consumer, nn.Linear)
    experiment = _Experiment(layer, before, consumer, run)
    for name in reversed(before):
        producer = layer.get_submodule(name)
        assert isinstance(producer, nn.Linear)
        for rows in _segments(producer.out_features, consumer.in_features):
            channels = _channels(experiment, name, producer.out_features, rows)
            if channels is not None:
                return Fold(group.linears, name, channels, len(rows), rows=rows)
    return None


def _segments(rows: int, columns: int) -> Iterator[Tensor]:
    """Which of a Linear's rows could be behind that many columns: all, a half, or the values of a fused q, k, v.

    Fused weights have as many query rows as the consumer has columns, and as many values as keys, which come last:
    of the whole weight (Phi-3), of each head (GPT-NeoX) or of each group of heads (Falcon).
    """
    index = torch.arange(rows)
    if columns % rows == 0:
        yield index
    if rows % 2 == 0 and columns % (rows // 2) == 0:
        yield index[rows // 2 :]
        yield index[: rows // 2]
    values, rest = divmod(rows - columns, 2)
    if values > 0 and rest == 0 and columns % values == 0:
        common = gcd(rows, values)
        for blocks in (n for n in range(1, common + 1) if common % n == 0):
            yield index.view(blocks, -1)[:, -(values // blocks) :].flatten()


def _channels(experiment: _Experiment, producer: str, out: int, rows: Tensor) -> Tensor | None:
    """For each column of the consumer's input the one of `rows` that it grows with, (in,); None if one does not."""
    plain = experiment.consumer_input()
    if plain is None:
        return None
    energy = plain.square().sum(0)
    number = torch.arange(len(rows))
    channels = torch.zeros(plain.shape[1], dtype=torch.long)
    place = 1
    while place < max(len(rows), 2):
        factors = torch.ones(out)
        factors[rows] = LEVELS[number // place % len(LEVELS)]
        scaled = experiment.consumer_input(producer, factors)
        if scaled is None:
            return None
        ratio = (plain * scaled).sum(0) / energy
        uneven = (scaled - ratio * plain).norm(dim=0) > TOLERANCE * scaled.norm(dim=0)
        off, digit = (ratio.cpu()[:, None] / LEVELS - 1).abs().min(dim=1)
        if bool(uneven.any()) or not bool((off <= TOLERANCE).all()):
            return None
        channels += place * digit
        place *= len(LEVELS)
    return channels if torch.equal(channels.unique(), number) else None


class _Reached(Exception):
    """Ends a run at the consumer."""


class _Experiment:
    """Runs a layer up to one of its Linears, with random numbers in place of what the Linears before it put out.

    Random outputs make the result independent of the weights: none is zero, and no unit of a ReLU is dead.
    """

    def __init__(self, layer: nn.Module, before: Sequence[str], consumer: nn.Linear, run: Run) -> None:
        self._layer, self._before, self._consumer, self._run = layer, before, consumer, run
        self._noise: dict[str, Tensor] = {}
        self._plain: Tensor | None = None

    def consumer_input(self, producer: str | None = None, factors: Tensor | None = None) -> Tensor | None:
        """What arrives at the consumer, (tokens, in), when the outputs of `producer` are multiplied by `factors`.

        None if the consumer is not reached.
        """
        if producer is None and self._plain is not None:
            return self._plain
        reached: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached.append(inputs[0].detach().flatten(0, -2).float())
            raise _Reached

        handle = self._consumer.register_forward_pre_hook(stop)
        linears = {name: self._layer.get_submodule(name) for name in self._before}
        for name, linear in linears.items():
            linear.__dict__["forward"] = self._stand_in(name, linear, factors if name == producer else None)
        try:
            self._run()
        except _Reached:
            pass
        finally:
            handle.remove()
            for linear in linears.values():
                del linear.__dict__["forward"]
        if producer is None:
            self._plain = reached[0] if reached else None
        return reached[0] if reached else None

    def _stand_in(self, name: str, linear: nn.Module, factors: Tensor | None) -> Callable[[Tensor], Tensor]:
        assert isinstance(linear, nn.Linear)
        out = linear.out_features

        def forward(x: Tensor) -> Tensor:
            if name not in self._noise:
                generator = torch.Generator().manual_seed(len(self._noise))
                noise = torch.randn(*x.shape[:-1], out, generator=generator)
                noise.view(-1, out)[0].abs_()  # the first token passes every ReLU
                self._noise[name] = noise.to(x)
            noise = self._noise[name]
            return noise if factors is None else noise * factors.to(x)

        return forward
