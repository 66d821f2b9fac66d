"""AWQ from a 16-bit model folder to a checkpoint writer, one decoder layer in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order, drop_tied_head
from backend.quantize.check import checked_architecture
from backend.quantize.layer import Writer, quantize_layer
from backend.quantize.settings import AwqSettings, LayerReport, QuantizationReport
from backend.quantize.stream import LayerStream, WeightFiles, best_dtype


@torch.no_grad()
def quantize_awq(
    model_dir: Path | str,
    tokens: Tensor,
    settings: AwqSettings,
    writer: Writer,
    *,
    device: torch.device | str = "cpu",
    on_layer: Callable[[LayerReport], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
    dtype: torch.dtype | None = None,
    microbatch: int | None = None,
) -> QuantizationReport:
    """Quantize a model folder with AWQ.

    Deterministic on one machine. The caller finishes the writer.

    Args:
        model_dir: Folder of a 16-bit decoder-only model.
        tokens: Calibration text, (samples, length), int64.
        settings: What to do.
        writer: Receives the artefact's tensors, in a fixed order.
        device: Where to compute.
        on_layer: Called after each decoder layer is written.
        on_stage: Called with `check`, `embed`, `layers`.
        dtype: Type of the calibration's forward passes; None: the fastest sound one of the device.
        microbatch: Samples per forward pass; None: about 4096 tokens.

    Raises:
        ModelError: If the model is not supported; before any weight is read.
        CheckpointError: If its files are broken.
        DataError: If the tokens are empty or not this model's.
    """
    stage = on_stage or (lambda name: None)
    stage("check")
    folder, device = Path(model_dir), torch.device(device)
    dtype = dtype or best_dtype(device)
    architecture = checked_architecture(folder, settings, dtype)
    report = QuantizationReport(tokens=tokens.numel(), device=str(device), compute_dtype=str(dtype).split(".")[1])
    weights = WeightFiles(folder)
    writer.declare_quantization(
        bits=settings.bits, group_size=settings.group_size, modules_to_not_convert=settings.modules_to_not_convert
    )
    outside = [
        t.name for t in drop_tied_head(read_headers(folder), read_config_json(folder)) if artefact_order(t.name)[0] < 0
    ]
    for name in sorted(outside, key=artefact_order):
        writer.add(name, weights.read([name], torch.device("cpu"), None)[name])

    stage("embed")
    stream = LayerStream(architecture, weights, tokens, device, dtype, microbatch)
    stage("layers")
    for index in range(len(architecture.layers)):
        layer_report, skipped = quantize_layer(stream, weights, index, settings, writer)
        report.layers.append(layer_report)
        report.skipped.update(skipped)
        if on_layer:
            on_layer(layer_report)
    return report
