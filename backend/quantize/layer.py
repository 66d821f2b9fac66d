"""One decoder layer under one recipe: search scales, fold, round, write."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backend.formats.weight import QuantizedWeight
from backend.quantize.awq import Target, search_scale
from backend.quantize.correction import Drift
from backend.quantize.fold import Fold, apply_fold, verify
from backend.quantize.gram import error_energy
from backend.quantize.grid import Grid
from backend.quantize.groups import weight_of
from backend.quantize.recipe import Recipe, Scheme
from backend.quantize.report import LayerReport
from backend.quantize.rounding import round_nearest, round_with_feedback
from backend.quantize.site import Site
from backend.quantize.stream import LayerStream, assign, call_layer

REPORT_ROWS = 128  # rows of each Linear whose output error is reported


class Writer(Protocol):
    """Takes the tensors of an artefact as they are made; `backend.formats.writer.CheckpointWriter` is one."""

    scale_dtype: torch.dtype

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type in which an unquantized tensor of a type is stored."""

    def refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why the format cannot hold a Linear (out, in) quantized like this; None if it can."""

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """One unquantized tensor."""

    def add_linear(self, prefix: str, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """One quantized Linear."""

    def commit(self) -> dict[str, Any]:
        """Everything so far is on disk; the state from which `restore` goes on."""

    def seal(self) -> None:
        """The state was kept: spooled data may become shards."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on after a commit of an earlier process."""


@dataclass
class LayerJob:
    """A calibrated decoder layer and what one recipe makes of it.

    Args:
        stream: Where its weights come from.
        index: Its position.
        layer: The module; its parameters are overwritten.
        sites: Its inputs.
        probe: Hidden states to check folds with, (1, tokens, width), float32.
        recipe: What to do.
        writer: Where the result goes.
    """

    stream: LayerStream
    index: int
    layer: nn.Module
    sites: Sequence[Site]
    probe: Tensor
    recipe: Recipe
    writer: Writer
    kept: dict[str, str] = field(default_factory=dict)
    _schemes: dict[str, Scheme] = field(default_factory=dict)
    _notes: list[str] = field(default_factory=list)
    _columns: dict[str, Tensor] = field(default_factory=dict)  # Linear -> what its columns were multiplied by
    _rows: dict[str, Tensor] = field(default_factory=dict)  # Linear -> what its rows were divided by

    def run(self, calibrate_s: float) -> LayerReport:
        """Quantize and write the layer."""
        began = time.perf_counter()
        self.reset()
        self._plan()
        self._fold(self._search())
        quantized: dict[str, QuantizedWeight] = {}
        drift = Drift(self.stream, self.index, self.layer) if self._corrected(self._schemes) else None
        for site in self.sites:
            if drift is not None and quantized:
                self._correct(site, drift, quantized)
            quantized |= self._round(site)
        del drift
        error, rtn_error = self._errors(quantized)
        self._write(quantized)
        return LayerReport(
            recipe=self.recipe.name,
            name=self.stream.prefix(self.index),
            index=self.index,
            total=self.stream.layers,
            relative_error=error,
            rtn_relative_error=rtn_error,
            notes=tuple(self._notes),
            calibrate_s=calibrate_s,
            quantize_s=time.perf_counter() - began,
        )

    def reset(self) -> None:
        """The layer's own weights, float32."""
        names = [name for name, _ in self.layer.named_parameters()]
        assign(self.layer, self.stream.read(self.index, names, torch.float32))

    def _plan(self) -> None:
        """Decide for every Linear of the layer."""
        for site in self.sites:
            for name in site.linears:
                full = f"{self.stream.prefix(self.index)}.{name}"
                out, width = weight_of(self.layer, name).shape
                scheme = self.recipe.scheme_for(full, width)
                reason = scheme if isinstance(scheme, str) else self.writer.refusal(scheme, (out, width))
                if reason is not None:
                    self.kept[full] = reason
                elif isinstance(scheme, Scheme):
                    self._schemes[name] = scheme

    def _factor(self, site: Site, scheme: Scheme) -> Any:
        return site.factor(self.recipe.damp, self.recipe.act_order) if scheme.feeds_back else None

    def _search(self) -> dict[Fold, Tensor]:
        """Scales worth folding."""
        found: dict[Fold, Tensor] = {}
        for site in self.sites:
            names = [n for n in site.linears if n in self._schemes and self._schemes[n].scales_channels]
            if not names or not self.recipe.scale_grid:
                continue
            if site.fold is None:
                self._notes.append(f"{', '.join(site.linears)}: no place to fold a scale, rounded without")
                continue
            targets = [
                Target(
                    weight_of(self.layer, n),
                    Grid.of(self._schemes[n], self.writer.scale_dtype),
                    self._factor(site, self._schemes[n]),
                )
                for n in names
            ]
            scale = search_scale(site, site.fold, targets, self.recipe.scale_grid, clip=self.recipe.clip)
            if scale is not None:
                found[site.fold] = scale
        return found

    def _fold(self, scales: Mapping[Fold, Tensor]) -> None:
        """Fold the scales that leave the layer's output unchanged."""
        if not scales:
            return
        columns: dict[Fold, Tensor] = {}

        def apply(fold: Fold) -> None:
            stored = self.stream.stored_dtype(self.index, f"{fold.producer}.weight")
            columns[fold] = apply_fold(self.layer, fold, scales[fold], self.writer.storage_dtype(stored))

        failed = verify(
            list(scales),
            run=lambda: call_layer(self.layer, self.probe, self.stream.call(self.index, self.probe)),
            apply=apply,
            reset=self.reset,
            hidden=self.probe,
        )
        for fold, scale in scales.items():
            if fold in failed:
                consumers = ", ".join(fold.consumers)
                self._notes.append(f"{consumers}: scale not folded into {fold.producer}, {failed[fold]}")
                continue
            self._columns |= dict.fromkeys(fold.consumers, columns[fold])
            if fold.rows is not None:
                rows = fold.row_scale(scale, len(weight_of(self.layer, fold.producer)))
                self._rows[fold.producer] = self._rows.get(fold.producer, 1.0) * rows

    def _corrected(self, names: Iterable[str]) -> list[str]:
        """Those Linears that make up for the errors of others."""
        if not self.recipe.correct:
            return []
        return [name for name in names if name in self._schemes and self._schemes[name].combines]

    def _correct(self, site: Site, drift: Drift, quantized: Mapping[str, QuantizedWeight]) -> None:
        """Give the site's Linears the weights whose outputs are right on the input that is there by now."""
        names = self._corrected(site.linears)
        if not names:
            return
        weights = [weight_of(self.layer, name) for name in names]
        columns = self._columns.get(names[0])
        targets = drift.target(names[0], torch.cat(weights), quantized, self.recipe.damp, columns)
        for weight, target in zip(weights, targets.split([len(w) for w in weights]), strict=True):
            weight.copy_(target)

    def _round(self, site: Site) -> dict[str, QuantizedWeight]:
        """Round the site's Linears; those with the same scheme together."""
        quantized: dict[str, QuantizedWeight] = {}
        clip = self.recipe.clip
        columns = self._columns.get(site.linears[0])
        schemes = dict.fromkeys(self._schemes[name] for name in site.linears if name in self._schemes)
        for scheme in schemes:
            names = [name for name in site.linears if self._schemes.get(name) == scheme]
            weights = [weight_of(self.layer, name) for name in names]
            grid = Grid.of(scheme, self.writer.scale_dtype)
            factor = self._factor(site, scheme)
            if factor is not None:
                if factor.damp != self.recipe.damp:
                    self._notes.append(f"{', '.join(names)}: H is singular, damping raised to {factor.damp:g}")
                sweeps = self.recipe.refine if scheme.combines else 0
                results = round_with_feedback(
                    weights, factor, grid, clip=clip, columns=columns, sweeps=sweeps, H=site.H
                )
            else:
                if scheme.feeds_back:
                    self._notes.append(f"{', '.join(names)}: H cannot be factorized, rounded to nearest instead")
                results = [round_nearest(w, site, grid, clip=clip, columns=columns) for w in weights]
            quantized |= dict(zip(names, results, strict=True))
        return quantized

    def _errors(self, quantized: Mapping[str, QuantizedWeight]) -> tuple[float, float]:
        """Relative output error of the quantized Linears and of plain rounding, in units of the original outputs."""
        signal = error = rtn = 0.0
        for site in self.sites:
            for name in (n for n in site.linears if n in quantized):
                stored = weight_of(self.layer, name)
                sample = slice(None, None, -(-len(stored) // REPORT_ROWS))
                rows, columns = self._rows.get(name), self._columns.get(name)
                back = torch.ones_like(stored[sample])  # from the folded weight to the original one
                if rows is not None:
                    back *= rows[sample, None]
                if columns is not None:
                    back /= columns
                w, found = stored[sample] * back, _rows_of(quantized[name], sample).dequantize() * back
                grid = Grid.of(self._schemes[name], self.writer.scale_dtype)
                signal += float(error_energy(w, site.H).sum())
                error += float(error_energy(found - w, site.H).sum())
                rtn += float(error_energy(grid.nearest(w) - w, site.H).sum())
        signal = max(signal, 1e-30)
        return error / signal, rtn / signal

    def _write(self, quantized: Mapping[str, QuantizedWeight]) -> None:
        parameters: dict[str, Tensor] = dict(self.layer.named_parameters())
        for name in sorted(parameters, key=lambda n: self.stream.stored_name(self.index, n)):
            key = self.stream.stored_name(self.index, name)
            source = self.stream.stored_dtype(self.index, name)
            module, _, kind = name.rpartition(".")
            if module not in quantized:
                self.writer.add(key, parameters[name], source)
            elif kind == "weight":
                bias = parameters.get(f"{module}.bias")
                if bias is not None:
                    dtype = self.stream.stored_dtype(self.index, f"{module}.bias")
                    bias = bias.to(self.writer.storage_dtype(dtype))
                self.writer.add_linear(key.removesuffix(".weight"), quantized[module], bias)


def _rows_of(weight: QuantizedWeight, rows: slice) -> QuantizedWeight:
    return QuantizedWeight(weight.q[rows], weight.scale[rows], weight.zero[rows], weight.bits, weight.symmetric)
