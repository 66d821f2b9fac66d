"""Finds, by watching one forward pass, which Linears of a layer read the same tensor and what made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class _Seen:
    """A tensor as a hook saw it; holding it keeps its memory from being used for another."""

    name: str
    tensor: Tensor
    version: int  # grows with every change in place

    @classmethod
    def now(cls, name: str, tensor: Tensor) -> _Seen:
        return cls(name, tensor, tensor._version)

    def same(self, other: _Seen) -> bool:
        """Whether both hold the same rows: one tensor, or two views that differ in their leading dimensions only."""
        a, b = self.tensor, other.tensor
        if self.version != other.version or a.shape[-1:] != b.shape[-1:] or a.dtype != b.dtype:
            return False
        whole = a.is_contiguous() and b.is_contiguous() and a.numel() == b.numel()
        return a is b or (whole and a.numel() > 0 and a.data_ptr() == b.data_ptr())


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
    """Watches a layer during one forward pass; tensors are told apart by their place in memory, not their values.

    Args:
        layer: A decoder layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._inputs: list[_Seen] = []
        self._norms: list[_Seen] = []
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
            self._inputs.append(_Seen.now(name, inputs[0]))

        return hook

    def _saw_output(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                self._norms.append(_Seen.now(name, output))

        return hook

    def groups(self) -> list[InputGroup]:
        """The groups seen, in the order of their first call."""
        shared: list[tuple[_Seen, list[str]]] = []
        for seen in self._inputs:
            for known, names in shared:
                if known.same(seen):
                    if seen.name not in names:
                        names.append(seen.name)
                    break
            else:
                shared.append((seen, [seen.name]))
        return [
            InputGroup(tuple(names), next((norm.name for norm in self._norms if norm.same(known)), None))
            for known, names in shared
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
