"""One decoder layer: its targets and Gram matrices, its codes, their finetuning, and what is written of it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backend.errors import ModelError
from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.activations import Activations
from backend.quantize.aqlm.block_data import BlockData
from backend.quantize.aqlm.block_finetune import Finetuned, finetune
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.found import Found, FoundCodes
from backend.quantize.aqlm.memory_hint import MemoryHint
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.report import BlockReport
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.trained_linear import TrainedLinear
from backend.quantize.aqlm.workers import FitPool
from backend.quantize.calibrate import GramWatcher, find_groups
from backend.quantize.gram import Gram, error_energy
from backend.quantize.groups import InputGroup
from backend.quantize.stream import LayerStream, assign


class Writer(Protocol):
    """Takes the tensors of an artefact as they are made; `backend.formats.writer.CheckpointWriter` is one."""

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type in which an unquantized tensor of a type is stored."""

    def refusal(self, scheme: AdditiveScheme, shape: tuple[int, int]) -> str | None:
        """Why the format cannot hold a Linear (out, in) with these codebooks; None if it can."""

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """One unquantized tensor."""

    def add_additive(self, prefix: str, weight: AdditiveWeight, bias: Tensor | None = None) -> None:
        """One Linear of codebooks."""

    def commit(self) -> dict[str, Any]:
        """Everything so far is on disk; the state from which `restore` goes on."""

    def seal(self) -> None:
        """The state was kept: spooled data may become shards."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after a commit of an earlier process."""


@dataclass(frozen=True)
class Plan:
    """What is the same for all layers.

    Attributes:
        scheme: Codebooks of a Linear.
        search: How codes are found.
        finetune: How layers are trained; None: they are not.
        true_sequential: Find the codes of one input group after the other, each on inputs that went through the codes
            before it.
        seed: Of all that is drawn.
        kept: Linears that stay in 16 bits, by full name.
    """

    scheme: AdditiveScheme
    search: SearchSettings
    finetune: FinetuneSettings | None
    true_sequential: bool
    seed: int
    kept: Mapping[str, str]


@dataclass
class BlockJob:
    """A decoder layer on its way from dense to stored.

    Args:
        stream: Where its weights and inputs come from.
        index: Its position.
        layer: The module; its parameters are overwritten.
        targets: Room for the dense layer's outputs.
        plan: What to do.
        pool: Finds codes.
        kept_codes: Where found codes are kept.
        hint: Told what is going on.
        writer: Where the result goes.
    """

    stream: LayerStream
    index: int
    layer: nn.Module
    targets: Activations
    plan: Plan
    pool: FitPool
    kept_codes: FoundCodes
    hint: MemoryHint
    writer: Writer
    _notes: list[str] = field(default_factory=list)

    def run(self) -> BlockReport:
        """Quantize, train and write the layer, and make the next layer's inputs.

        Raises:
            ModelError: If activations are not finite.
            EngineError: If memory runs out.
        """
        name = self.stream.prefix(self.index)
        clock = _Clock()
        data = BlockData(self.stream, self.index, self.targets)
        found = self.kept_codes.load(self.index, self.stream.device)
        self._find(found, data, clock)
        self._put({linear: entry.weight.stored() for linear, entry in found.items()})
        self._doing("measuring")
        before = after = self._error(data)
        result, trained = Finetuned((), 0, ()), {linear: entry.weight for linear, entry in found.items()}
        clock.lap("finish")
        if self.plan.finetune is not None and self.plan.finetune.max_epochs:
            self._doing("finetuning", finetuning=True)
            result, trained = self._finetune(trained, data, self.plan.finetune)
            clock.lap("finetune")
        self._doing("writing")
        stored = {linear: weight.stored() for linear, weight in trained.items()}
        parameters = self._settle(stored)
        self._write(stored, parameters)
        if result.best_epoch:
            after = self._error(data)
        for _ in self.stream.advance(self.index, self.layer):
            pass
        clock.lap("finish")
        signal = max(sum(entry.signal for entry in found.values()), 1e-30)
        return BlockReport(
            name=name,
            index=self.index,
            total=self.stream.layers,
            linear_error=sum(entry.error for entry in found.values()) / signal,
            relative_error_before=before,
            relative_error=after,
            validation=result.validation,
            best_epoch=result.best_epoch,
            notes=(*(f"{linear}: {note}" for linear, entry in found.items() for note in entry.notes), *result.notes),
            calibrate_s=clock.seconds["calibrate"],
            fit_s=clock.seconds["fit"],
            finetune_s=clock.seconds["finetune"],
            finish_s=clock.seconds["finish"],
        )

    def _doing(self, what: str, *, finetuning: bool = False) -> None:
        self.hint.doing, self.hint.finetuning = f"{what} {self.stream.prefix(self.index)}", finetuning

    def _find(self, found: dict[str, Found], data: BlockData, clock: _Clock) -> None:
        """Record the targets and complete the codes of all Linears that get some."""
        probe = self.stream.probe().to(self.stream.dtype)
        groups = find_groups(self.layer, probe, self.stream.call(self.index, probe))
        stages = [[group] for group in groups] if self.plan.true_sequential else [groups]
        for number, stage in enumerate(stages):
            missing = [group for group in stage if any(n not in found for n in self._quantized(group))]
            if number == 0 or missing:
                self._doing("calibrating")
                grams = self._calibrate(missing, data, first=number == 0)
                clock.lap("calibrate")
            if missing:
                self._doing("finding codes of")
                found |= self._fit(grams)
                self.kept_codes.save(self.index, found)
                clock.lap("fit")
            if number + 1 < len(stages):
                self._put({n: found[n].weight.stored() for group in stage for n in self._quantized(group)})

    def _quantized(self, group: InputGroup) -> list[str]:
        return [name for name in group.linears if f"{self.stream.prefix(self.index)}.{name}" not in self.plan.kept]

    def _calibrate(self, groups: Sequence[InputGroup], data: BlockData, *, first: bool) -> dict[InputGroup, Gram]:
        """Gram matrices of some groups' inputs in the layer as it is; `first`: it is dense, its outputs are targets."""
        with GramWatcher(self.layer, groups, self.stream.device) as watcher:
            for number in (*data.training, *data.held_out) if first else data.training:
                watcher.mask, watcher.paused = self.stream.mask(number), number in data.held_out
                if first:
                    data.record(self.layer, number)
                else:
                    data.run(self.layer, number)
        watcher.check(f"Layer {self.index}")
        data.check()
        return watcher.grams

    def _fit(self, grams: dict[InputGroup, Gram]) -> dict[str, Found]:
        """Find codes and codebooks of all Linears of some groups."""
        names = {name: group for group in grams for name in self._quantized(group)}
        H = {group: gram.H for group, gram in grams.items()}  # noqa: N806
        read = self.stream.read(self.index, [f"{name}.weight" for name in names], torch.float32)
        W = {name: read.pop(f"{name}.weight") for name in names}  # noqa: N806
        items = {name: (W[name], H[group], self._seed(name)) for name, group in names.items()}
        fitted = self.pool.fit_all(items, self.plan.scheme, self.plan.search, None)
        found: dict[str, Found] = {}
        for name, group in names.items():
            weight = fitted[name].weight
            error = float(error_energy(weight.dequantize() - W[name], H[group]).sum())
            signal = float(error_energy(W[name], H[group]).sum())
            found[name] = Found(weight, error, signal, tuple(fitted[name].notes))
        return found

    def _seed(self, name: str) -> int:
        """Differs for every Linear, and does not depend on the order in which they are done."""
        text = f"{self.plan.seed}:{self.stream.prefix(self.index)}.{name}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")

    def _put(self, weights: Mapping[str, AdditiveWeight]) -> None:
        """Have the layer compute with these weights."""
        assign(self.layer, {f"{name}.weight": w.dequantize(self.stream.dtype) for name, w in weights.items()})

    def _error(self, data: BlockData) -> float:
        error = data.relative_error(self.layer, data.judged)
        if not math.isfinite(error):
            raise ModelError(
                f"Layer {self.index}: with codebooks its outputs on the calibration text are not finite in "
                f"{str(self.stream.dtype).removeprefix('torch.')}."
            )
        return error

    def _finetune(
        self, weights: Mapping[str, AdditiveWeight], data: BlockData, settings: FinetuneSettings
    ) -> tuple[Finetuned, dict[str, AdditiveWeight]]:
        """Train; the layer's unquantized parameters are float32 afterwards."""
        names = [name for name, _ in self.layer.named_parameters()]
        quantized = {f"{name}.weight" for name in weights}
        unquantized = [name for name in names if name not in quantized]
        assign(self.layer, self.stream.read(self.index, unquantized, torch.float32))
        plain: dict[str, nn.Linear] = {}
        trained: dict[str, TrainedLinear] = {}
        for name, weight in weights.items():
            linear = self.layer.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            plain[name] = linear
            trained[name] = TrainedLinear(weight, linear.bias, recompute=settings.use_checkpointing)
            self.layer.set_submodule(name, trained[name])
        try:
            result = finetune(self.layer, data, settings, self._seed("finetune"))
        finally:
            for name, linear in plain.items():
                self.layer.set_submodule(name, linear)
        for name, module in trained.items():
            if module.bias is not None:
                assign(plain[name], {"bias": module.bias.detach()})
        return result, {name: module.value for name, module in trained.items()}

    def _settle(self, stored: Mapping[str, AdditiveWeight]) -> dict[str, Tensor]:
        """Have the layer compute with what a reader of the checkpoint gets.

        Returns:
            The parameters that are not quantized, for the writer, which rounds them in the same way.
        """
        parameters: dict[str, Tensor] = {}
        quantized = {f"{name}.weight" for name in stored}
        rest = [name for name, _ in self.layer.named_parameters() if name not in quantized]
        trained = self.plan.finetune is not None and self.plan.finetune.max_epochs > 0
        values = dict(self.layer.named_parameters()) if trained else self.stream.read(self.index, rest, torch.float32)
        for name in rest:
            parameters[name] = values[name].detach()
            dtype = self.writer.storage_dtype(self.stream.stored_dtype(self.index, name))
            assign(self.layer, {name: parameters[name].to(dtype).to(self.stream.dtype)})
        self._put(stored)
        return parameters

    def _write(self, stored: Mapping[str, AdditiveWeight], parameters: Mapping[str, Tensor]) -> None:
        names = [name for name, _ in self.layer.named_parameters()]
        for name in sorted(names, key=lambda n: self.stream.stored_name(self.index, n)):
            key = self.stream.stored_name(self.index, name)
            module, _, kind = name.rpartition(".")
            if module not in stored:
                self.writer.add(key, parameters[name], self.stream.stored_dtype(self.index, name))
            elif kind == "weight":
                bias = parameters.get(f"{module}.bias")
                self.writer.add_additive(key.removesuffix(".weight"), stored[module], bias)


class _Clock:
    """Seconds per kind of work."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("calibrate", "fit", "finetune", "finish"), 0.0)
        self._began = time.perf_counter()

    def lap(self, kind: str) -> None:
        now = time.perf_counter()
        self.seconds[kind] += now - self._began
        self._began = now
