"""One decoder layer: calibrate, search, fold, round, write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from backend.formats.size import is_quantized_linear
from backend.formats.weight import QuantizedWeight
from backend.quantize.architecture import LAYERS
from backend.quantize.awq import ScaleChoice, quantize_weight, search_scale
from backend.quantize.calibrate import calibrate
from backend.quantize.fold import Fold, apply_fold, find_fold, verify
from backend.quantize.gram import error_energy
from backend.quantize.grid import Grid
from backend.quantize.groups import weight_of
from backend.quantize.settings import AwqSettings, LayerReport
from backend.quantize.stream import LayerStream, WeightFiles, assign, call_layer


class Writer(Protocol):
    """Takes the tensors of the artefact as they are made; `backend.formats.writer.CheckpointWriter` is one."""

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Type in which an unquantized tensor of a type is stored."""

    def declare_quantization(self, *, bits: int, group_size: int, modules_to_not_convert: Sequence[str]) -> None:
        """Called once, first."""

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """One unquantized tensor."""

    def add_linear(self, prefix: str, weight: QuantizedWeight, bias: Tensor | None = None) -> None:
        """One quantized Linear."""


@dataclass
class _Site:
    """One input group with what is known about it so far."""

    linears: tuple[str, ...]  # those to quantize
    H: Tensor  # of the input; from the fold on, of the scaled input
    fold: Fold | None
    choice: ScaleChoice
    signal: float  # tr(W H W^T)


def quantize_layer(
    stream: LayerStream, weights: WeightFiles, index: int, settings: AwqSettings, writer: Writer
) -> tuple[LayerReport, dict[str, str]]:
    """Quantize decoder layer `index`, write it, and leave the stream at the next layer.

    Returns:
        The report, and the Linears kept in 16 bits with the reason.
    """
    grid = Grid(settings.bits, settings.group_size, settings.zero_point)
    prefix = f"{LAYERS}.{index}"
    began = time.perf_counter()
    with stream.layer(index) as layer:
        probe = stream.probe()
        grams = calibrate(stream, index, layer)
        calibrated = time.perf_counter()

        names = [name for name, _ in layer.named_parameters()]

        def reset() -> None:
            read = weights.read([f"{prefix}.{name}" for name in names], stream.device, torch.float32)
            assign(layer, {name: read[f"{prefix}.{name}"] for name in names})

        reset()
        kept = [n for n, m in layer.named_modules() if isinstance(m, nn.Linear) and _kept(f"{prefix}.{n}", m, settings)]
        sites: list[_Site] = []
        for group, gram in grams.items():
            linears = tuple(name for name in group.linears if name not in kept)
            if linears:
                fold = find_fold(layer, group)
                sites.append(_search(layer, linears, gram.H, gram.mean_abs, fold, grid, settings.scale_grid))
        grams.clear()
        storage = writer.storage_dtype(weights.dtype(f"{prefix}.{names[0]}"))
        notes, row_scales = _fold(layer, sites, stream, index, probe, storage, reset)
        energy, quantized = _round(layer, sites, grid, settings.clip, row_scales)
        _write(layer, prefix, quantized, weights, writer)
    signal = max(sum(site.signal for site in sites), 1e-30)
    report = LayerReport(
        name=prefix,
        index=index,
        total=stream.layers,
        relative_error=energy / signal,
        rtn_relative_error=sum(site.choice.rtn_energy for site in sites) / signal,
        notes=tuple(notes),
        calibrate_s=calibrated - began,
        quantize_s=time.perf_counter() - calibrated,
    )
    return report, {f"{prefix}.{name}": "in modules_to_not_convert" for name in kept}


def _kept(name: str, linear: nn.Linear, settings: AwqSettings) -> bool:
    return not is_quantized_linear(f"{name}.weight", tuple(linear.weight.shape), settings.modules_to_not_convert)


def _search(
    layer: nn.Module,
    linears: tuple[str, ...],
    H: Tensor,  # noqa: N803
    mean_abs: Tensor,
    fold: Fold | None,
    grid: Grid,
    ratios: int,
) -> _Site:
    group = [weight_of(layer, name) for name in linears]
    channels, width = (fold.channels.to(H.device), fold.width) if fold else (None, H.shape[0])
    choice = search_scale(group, H, mean_abs, grid, ratios, channels, width)
    signal = sum(float(error_energy(w, H).sum()) for w in group)
    return _Site(linears, H, fold, choice, signal)


def _fold(
    layer: nn.Module,
    sites: list[_Site],
    stream: LayerStream,
    index: int,
    probe: Tensor,
    storage: torch.dtype,
    reset: Callable[[], None],
) -> tuple[list[str], dict[str, Tensor]]:
    """Fold the chosen scales that leave the layer's output unchanged, and scale each site's H to match.

    Returns:
        Notes about scales that could not be used, and for each Linear whose rows were divided, by what (out,).
    """
    wanted = {site.fold: site for site in sites if site.fold is not None and site.choice.scale is not None}
    columns: dict[Fold, Tensor] = {}

    def apply(fold: Fold) -> None:
        scale = wanted[fold].choice.scale
        assert scale is not None
        columns[fold] = apply_fold(layer, fold, scale, storage)

    failed = verify(
        list(wanted),
        run=lambda: call_layer(layer, probe, stream.arguments(index, probe)),
        apply=apply,
        reset=reset,
        hidden=probe,
    )
    notes = [f"{', '.join(s.linears)}: no place to fold a scale, rounded without" for s in sites if s.fold is None]
    row_scales: dict[str, Tensor] = {}
    for fold, site in wanted.items():
        if fold in failed:
            notes.append(f"{', '.join(site.linears)}: scale not folded into {fold.producer}, {failed[fold]}")
            continue
        site.H = site.H / columns[fold][:, None] / columns[fold]
        if weight_of(layer, fold.producer).dim() == 2 and site.choice.scale is not None:
            row_scales[fold.producer] = site.choice.scale
    return notes, row_scales


def _round(
    layer: nn.Module, sites: list[_Site], grid: Grid, clipping: bool, row_scales: dict[str, Tensor]
) -> tuple[float, dict[str, QuantizedWeight]]:
    """Quantize all Linears; the energy of their output errors is in units of the original outputs."""
    total = 0.0
    quantized: dict[str, QuantizedWeight] = {}
    for site in sites:
        for name in site.linears:
            quantized[name], energy = quantize_weight(weight_of(layer, name), site.H, grid, clipping=clipping)
            total += float((energy * row_scales[name].square()).sum() if name in row_scales else energy.sum())
    return total, quantized


def _write(
    layer: nn.Module, prefix: str, quantized: dict[str, QuantizedWeight], weights: WeightFiles, writer: Writer
) -> None:
    parameters = dict(layer.named_parameters())
    for name in sorted(parameters):
        module, _, kind = name.rpartition(".")
        if module not in quantized:
            writer.add(f"{prefix}.{name}", parameters[name], weights.dtype(f"{prefix}.{name}"))
        elif kind == "weight":
            bias = parameters.get(f"{module}.bias")
            target = None if bias is None else bias.to(writer.storage_dtype(weights.dtype(f"{prefix}.{module}.bias")))
            writer.add_linear(f"{prefix}.{module}", quantized[module], target)
