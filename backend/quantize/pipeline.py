"""From a 16-bit model folder to checkpoint writers: one pass over the calibration text, any number of recipes.

One decoder layer is in memory at a time. A run that was interrupted goes on after its last finished layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order, drop_tied_head
from backend.quantize.activations import MEMORY_LIMIT
from backend.quantize.calibrate import calibrate
from backend.quantize.check import check_recipe, checked_architecture
from backend.quantize.checkpoint import Checkpoint, fingerprint
from backend.quantize.correction import TOKENS
from backend.quantize.layer import LayerJob, Writer
from backend.quantize.memory import release_memory
from backend.quantize.producers import FoldFinder
from backend.quantize.recipe import Recipe
from backend.quantize.report import LayerReport, QuantizationReport
from backend.quantize.site import Site
from backend.quantize.stream import LayerStream, assign, best_dtype, call_layer
from backend.quantize.weights import WeightFiles


@torch.no_grad()
def quantize(
    model_dir: Path | str,
    tokens: Tensor,
    recipes: Sequence[Recipe],
    writers: Sequence[Writer],
    *,
    lengths: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    microbatch: int | None = None,
    checkpoint_dir: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    on_layer: Callable[[LayerReport], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> QuantizationReport:
    """Quantize a model folder under one or several recipes.

    Each result is the same, bit for bit, as if its recipe had run alone, and as if the run had not been interrupted,
    on one machine with one number of threads. The caller finishes the writers, with the report's `kept`.

    Args:
        model_dir: Folder of a 16-bit decoder-only model.
        tokens: Calibration text, (samples, length), int64.
        recipes: What to do; their names differ.
        writers: One for each recipe; receives its artefact's tensors, in a fixed order.
        lengths: Tokens of each sample that are text, (samples,); None: all.
        device: Where to compute.
        dtype: Type of the calibration's forward passes; None: the fastest sound one of the device.
        microbatch: Samples per forward pass; None: about 4096 tokens.
        checkpoint_dir: Where progress is kept so that the same call can go on after an interruption; None: nowhere.
        memory_limit: Bytes of activations above which they live on disk.
        on_layer: Called after each decoder layer and recipe.
        on_stage: Called with `check`, `embed`, `layers`.

    Raises:
        ModelError: If the model is not supported, or its weights or activations are not finite.
        CheckpointError: If its files are broken, or the disk is full.
        DataError: If the tokens are empty or not this model's.
    """
    stage = on_stage or (lambda name: None)
    tell = on_layer or (lambda report: None)
    stage("check")
    folder, device = Path(model_dir), torch.device(device)
    dtype = dtype or best_dtype(device)
    architecture = checked_architecture(folder, dtype)
    for recipe in recipes:
        check_recipe(architecture, recipe)
    weights = WeightFiles(folder)
    text = tokens.numel() if lengths is None else int(lengths.sum())
    report = QuantizationReport(tokens=text, device=str(device), compute_dtype=str(dtype).split(".")[1])

    checkpoint, state = None, None
    if checkpoint_dir is not None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        key = fingerprint(folder, tokens, lengths, recipes, device=device.type, dtype=dtype, microbatch=microbatch)
        checkpoint = Checkpoint(checkpoint_dir, key)
        state = checkpoint.load()
        if state is None:
            checkpoint.clear()
    stage("embed")
    stream = LayerStream(
        architecture, weights, tokens, lengths, device, dtype, microbatch=microbatch, folder=checkpoint_dir,
        memory_limit=memory_limit, start=state["layer"] if state else 0,
        keep=TOKENS if any(recipe.corrects for recipe in recipes) else 0,
    )  # fmt: skip
    if state and stream.start:
        for writer, kept in zip(writers, state["writers"], strict=True):
            writer.restore(kept)
        report.layers, report.kept, report.resumed_at = state["reports"], state["kept"], stream.start
    else:
        if checkpoint is not None:
            checkpoint.clear()
        report.kept = {recipe.name: {} for recipe in recipes}
        write_outside(folder, weights, [writer.add for writer in writers])

    stage("layers")
    finder = FoldFinder()
    for index in range(report.resumed_at, stream.layers):
        for layer_report in _quantize_layer(stream, index, finder, recipes, writers, report.kept):
            report.layers.append(layer_report)
            tell(layer_report)
        if checkpoint is not None:
            checkpoint.save(index + 1, report.layers, report.kept, [writer.commit() for writer in writers])
            for writer in writers:
                writer.seal()
        release_memory()
    stream.activations.close()
    return report


def write_outside(folder: Path, weights: WeightFiles, adders: Sequence[Callable[[str, Tensor], None]]) -> None:
    """Hand on, by its name, everything that does not belong to a decoder layer, as it is."""
    headers = drop_tied_head(read_headers(folder), read_config_json(folder))
    outside = [info.name for info in headers if artefact_order(info.name)[0] < 0]
    for name in sorted(outside, key=artefact_order):
        tensor = weights.read([name], torch.device("cpu"), None)[name]
        for add in adders:
            add(name, tensor)


def _quantize_layer(
    stream: LayerStream,
    index: int,
    finder: FoldFinder,
    recipes: Sequence[Recipe],
    writers: Sequence[Writer],
    kept: dict[str, dict[str, str]],
) -> list[LayerReport]:
    """Calibrate a layer once, then quantize it under every recipe."""
    began = time.perf_counter()
    reports: list[LayerReport] = []
    with stream.layer(index) as layer:
        probe = stream.probe()
        grams = calibrate(stream, index, layer)
        names = [name for name, _ in layer.named_parameters()]
        assign(layer, stream.read(index, names, torch.float32))
        folds = finder.find(layer, list(grams), lambda: call_layer(layer, probe, stream.call(index, probe)))
        fast = best_dtype(stream.device)
        sites = [Site(group.linears, gram.H, gram.mean_abs, folds[group], fast) for group, gram in grams.items()]
        grams.clear()
        calibrate_s = time.perf_counter() - began
        for recipe, writer in zip(recipes, writers, strict=True):
            job = LayerJob(stream, index, layer, sites, probe, recipe, writer)
            reports.append(job.run(calibrate_s))
            kept[recipe.name] |= job.kept
    return reports
