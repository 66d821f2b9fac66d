"""Finds, by watching one forward pass, which Linears of a layer read the same tensor and what made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class InputGroup:
    """Linears that share their input.

    Attributes:
        linears: Names inside the layer, in the order of their calls.
        norm: Name of the normalisation whose output is that input; None if something else made it.
    """

    linears: tuple[str, ...]
    norm: str | None


class GroupWatcher:
    """Watches a layer during one forward pass; tensors are told apart by identity.

    Args:
        layer: A decoder layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._inputs: list[tuple[str, Tensor]] = []
        self._norms: list[tuple[str, Tensor]] = []
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> GroupWatcher:
        for name, module in self._layer.named_modules():
            if isinstance(module, nn.Linear):
                self._handles.append(module.register_forward_pre_hook(self._saw_input(name)))
            elif _is_norm(module):
                self._handles.append(module.register_forward_hook(self._saw_output(name)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _saw_input(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._inputs.append((name, inputs[0]))

        return hook

    def _saw_output(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._norms.append((name, output))

        return hook

    def groups(self) -> list[InputGroup]:
        """The groups seen, in the order of their first call."""
        tensors: list[tuple[Tensor, list[str]]] = []
        for name, tensor in self._inputs:
            for known, names in tensors:
                if known is tensor:
                    names.append(name)
                    break
            else:
                tensors.append((tensor, [name]))
        return [
            InputGroup(tuple(names), next((n for n, output in self._norms if output is tensor), None))
            for tensor, names in tensors
        ]


def weight_of(layer: nn.Module, name: str) -> Tensor:
    """The weight of a Linear or norm inside a layer."""
    weight = layer.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _is_norm(module: nn.Module) -> bool:
    """A module without children whose first parameter is one weight vector."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and isinstance(weight, nn.Parameter) and weight.dim() == 1
