"""The model that is tuned: ordinary Linears with dequantised weights, and beside them what the weights are made of.

Forward and backward know nothing of codebooks: weights are dequantised once per step, and the gradient of a weight is
turned into those of its codebooks and scales afterwards.
"""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from backend.errors import CheckpointError
from backend.formats.additive_reader import read_additive, read_unquantized
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.aqlm import PARTS
from backend.formats.headers import read_headers
from backend.formats.skeleton import match_tensors, read_config, state_of
from backend.quantize.aqlm.tune.group import Group, local, spread
from backend.quantize.aqlm.tune.linear import TunedLinear
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.architecture import Architecture, describe
from backend.quantize.stream import best_dtype


class Student:
    """A model of additive weights, ready to be tuned.

    Args:
        folder: Its AQLM checkpoint.
        settings: What will be updated, and in which types.
        device: Where to compute.
        group: The processes that share it.

    Attributes:
        model: Its modules.
        linears: Quantized Linears, by name in the checkpoint's files.
        others: The other parameters, float32, by name in the files; of each, the rows that this process holds.

    Raises:
        ModelError: If the folder is no AQLM checkpoint of a supported model.
        CheckpointError: If its files are broken or do not fit the model.
    """

    def __init__(self, folder: Path, settings: TuneSettings, device: torch.device, group: Group) -> None:
        self._settings, self._device, self._group = settings, device, group
        architecture = describe(read_config(folder), torch.float32)
        self.model = architecture.model
        self.linears: dict[str, TunedLinear] = {}
        self._weights: dict[str, nn.Linear] = {}
        names: dict[str, str] = {}  # of the other parameters: in the files -> in the model
        self._load(folder, architecture, names)
        self._parameters = {stored: self.model.get_parameter(name) for stored, name in sorted(names.items())}
        self.others = {stored: local(parameter) for stored, parameter in self._parameters.items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """(n, L) -> (n, L, vocabulary)."""
        amp = amp_dtype(self._settings, self._device)
        autocast = nullcontext() if amp == torch.float32 else torch.autocast(self._device.type, amp)
        with autocast:
            logits: Tensor = self.model(input_ids=tokens.to(self._device), use_cache=False).logits
        return logits

    def sync_gradients(self, now: bool) -> None:
        """Whether the next backward pass ends with a sum of gradients over the processes."""
        if self._group.size > 1:
            assert isinstance(self.model, FSDPModule)
            self.model.set_requires_gradient_sync(now)

    def gradient(self, name: str) -> Tensor | None:
        """This process's rows of the gradient of a weight or parameter, float32, handed over; None if it has none.

        The sum over the processes' sequences, as each gave it to the backward pass.
        """
        parameter = self._weights[name].weight if name in self._weights else self._parameters[name]
        if parameter.grad is None:
            return None
        grad = local(parameter.grad).to(torch.float32)
        parameter.grad = None
        return grad.mul_(self._group.size)  # FSDP has taken the mean

    def dequantize(self, name: str) -> None:
        """Bring a weight up to date with what it is made of."""
        local(self._weights[name].weight).copy_(self.linears[name].weight())

    def snapshot(self) -> dict[str, Tensor]:
        """Copies on the CPU of all that was tuned, by name in the files: whole tensors, in every process."""
        tensors: dict[str, Tensor] = {}
        for name, linear in self.linears.items():
            whole = linear.whole()
            parts = (whole.codes, whole.codebooks, whole.scales)
            tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in zip(PARTS, parts, strict=True)}
        for name, parameter in self._parameters.items():
            tensors[name] = self._group.gather_rows(self.others[name], len(parameter)).cpu().clone()
        return tensors

    def _load(self, folder: Path, architecture: Architecture, others: dict[str, str]) -> None:
        model, state = architecture.model, state_of(architecture.model)
        stored_names = {info.name for info in read_headers(folder)}
        prefixes = {n.removesuffix(f".{PARTS[0]}") for n in stored_names if n.endswith(f".{PARTS[0]}")}
        parts = {f"{prefix}.{part}" for prefix in prefixes for part in PARTS}
        places = match_tensors(model, [*(stored_names - parts), *(f"{prefix}.weight" for prefix in prefixes)])
        if places.missing or places.unexpected:
            wrong = (places.missing or places.unexpected)[0]
            raise CheckpointError(f"{folder}: tensor {wrong} is missing, or {architecture.name} does not have it.")
        named = {stored: name for name, stored in places.stored.items()}
        for module in model.modules():  # what modules compute for themselves
            for key, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_meta:
                    setattr(module, key, buffer.to(self._device))
        for stored, tensor in read_unquantized(folder):
            if stored in named:
                name = named[stored]
                _check_shape(folder, stored, tensor.shape, state[name].shape)
                self._place(name, tensor, isinstance(state[name], nn.Parameter))
                if isinstance(state[name], nn.Parameter):
                    others[stored] = name
        model.tie_weights()
        layer_of = {prefix: _layer_of(named[f"{prefix}.weight"], architecture) for prefix in prefixes}
        waiting = Counter(layer_of.values())
        for index in set(range(len(architecture.layers))) - set(waiting):
            self._finish(architecture.layers[index])
        for prefix, weight in read_additive(folder):  # layer by layer: one at a time is whole in memory
            name = named[f"{prefix}.weight"]
            _check_shape(folder, prefix, weight.shape, state[name].shape)
            self._quantized(prefix, model.get_submodule(name.removesuffix(".weight")), weight)
            waiting[layer_of[prefix]] -= 1
            if not waiting[layer_of[prefix]]:
                self._finish(architecture.layers[layer_of[prefix]])
        spread(model, self._group)

    def _place(self, name: str, tensor: Tensor, is_parameter: bool) -> None:
        """Put a tensor where the model has `name`."""
        parent, _, leaf = name.rpartition(".")
        value = tensor.to(self._device, torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        if is_parameter:
            value = nn.Parameter(value, requires_grad=self._settings.update_non_quantized_parameters)
        setattr(self.model.get_submodule(parent), leaf, value)

    def _quantized(self, prefix: str, module: nn.Module, weight: AdditiveWeight) -> None:
        assert isinstance(module, nn.Linear)
        weight = AdditiveWeight(*(t.to(self._device) for t in (weight.codes, weight.codebooks, weight.scales)))
        learns = self._settings.update_codes or self._settings.update_codebooks_and_scales
        dense = weight.dequantize(getattr(torch, self._settings.master_dtype))
        module.weight = nn.Parameter(dense, requires_grad=learns)
        self._weights[prefix] = module
        self.linears[prefix] = TunedLinear(weight, self._group, self._device)

    def _finish(self, layer: nn.Module) -> None:
        """A decoder layer has all its tensors."""
        if self._settings.gradient_checkpointing:
            again = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
            layer.forward = again
        spread(layer, self._group)


def amp_dtype(settings: TuneSettings, device: torch.device) -> torch.dtype:
    """The type of the forward and backward passes."""
    return best_dtype(device) if settings.amp_dtype is None else getattr(torch, settings.amp_dtype)


def _layer_of(name: str, architecture: Architecture) -> int:
    return int(name.removeprefix(f"{architecture.layers_path}.").partition(".")[0])


def _check_shape(folder: Path, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{folder}: {name} has shape {tuple(found)}; config.json says {tuple(expected)}.")
