"""AQLM's calibration: from a 16-bit model folder to a checkpoint of codebooks, one decoder layer at a time.

A layer's inputs come through the quantized layers before it; its targets are what the dense layer answers to them.
Codes of all its Linears are found on Gram matrices of these inputs, then the layer is trained as a whole. A run that
was interrupted goes on after its last finished layer, and in a layer after its codes were found.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from backend.errors import ConfigError
from backend.quantize.activations import MEMORY_LIMIT
from backend.quantize.aqlm.block import BlockJob, Plan, Writer
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.found import FoundCodes
from backend.quantize.aqlm.memory_hint import MemoryHint
from backend.quantize.aqlm.plan import KEEP, kept_linears
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.report import BlockReport, CalibrationReport
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.workers import FitPool
from backend.quantize.check import checked_architecture
from backend.quantize.checkpoint import Checkpoint, fingerprint
from backend.quantize.memory import release_memory
from backend.quantize.pipeline import write_outside
from backend.quantize.stream import MICROBATCH_TOKENS, LayerStream, best_dtype
from backend.quantize.weights import WeightFiles


@torch.no_grad()
def calibrate(
    model_dir: Path | str,
    tokens: Tensor,
    scheme: AdditiveScheme,
    search: SearchSettings,
    finetune: FinetuneSettings | None,
    writer: Writer,
    *,
    val_size: int = 0,
    lengths: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    checkpoint_dir: Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    workers: int = 1,
    true_sequential: bool = False,
    keep: Sequence[str] = KEEP,
    seed: int = 0,
    on_layer: Callable[[BlockReport], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> CalibrationReport:
    """Quantize a model folder with AQLM. The caller finishes the writer, with the report's `kept`.

    The artefact is the same, bit for bit, whatever the number of workers and as if the run had not been interrupted,
    on one machine with one number of threads.

    Args:
        model_dir: Folder of a 16-bit decoder-only model.
        tokens: Calibration text, (samples, length), int64.
        scheme: Codebooks of every Linear that they fit; the others stay in 16 bits.
        search: How codes are found.
        finetune: How layers are trained afterwards; None: they are not.
        writer: Receives the artefact's tensors, in a fixed order.
        val_size: The last so many samples are held out: no Gram matrix and no training sees them, only judgement.
        lengths: Tokens of each sample that are text, (samples,); None: all.
        device: Where to compute.
        dtype: Type of the calibration's forward passes; None: the fastest sound one of the device. Training keeps
            parameters and sums in float32.
        checkpoint_dir: Where progress is kept so that the same call can go on after an interruption; None: nowhere.
        memory_limit: Bytes of activations (inputs and targets of a layer) above which they live on disk.
        workers: Processes that find codes on a CPU.
        true_sequential: Find the codes of one input group after the other (q, k, v; o; gate, up; down), each on inputs
            that went through the codes before it. The layer is trained once, at the end.
        keep: Linears whose name contains one of these stay in 16 bits.
        seed: Of all that is drawn.
        on_layer: Called after each decoder layer.
        on_stage: Called with `check`, `embed`, `layers`.

    Raises:
        ConfigError: If `val_size` leaves no sample to calibrate on.
        ModelError: If the model is not supported (mixtures of experts, say, for whose layers alone AQLM's
            `mix_compression` has a meaning), nothing of it fits the scheme, or weights or activations are not finite.
        CheckpointError: If its files are broken, or the disk is full.
        DataError: If the tokens are empty or not this model's.
        EngineError: If memory runs out.
    """
    stage = on_stage or (lambda name: None)
    tell = on_layer or (lambda report: None)
    stage("check")
    _check_split(val_size, len(tokens))
    folder, device = Path(model_dir), torch.device(device)
    dtype = dtype or best_dtype(device)
    if finetune is not None and not finetune.max_epochs:
        finetune = None
    architecture = checked_architecture(folder, dtype)
    kept = kept_linears(architecture, scheme, keep, writer.refusal)
    weights = WeightFiles(folder)
    report = CalibrationReport(kept=kept, device=str(device), compute_dtype=str(dtype).split(".")[1])
    counts = torch.full((len(tokens),), tokens.shape[-1]) if lengths is None else lengths
    report.held_out_tokens = int(counts[len(counts) - val_size :].sum())
    report.tokens = int(counts.sum()) - report.held_out_tokens
    microbatch = finetune.local_batch(tokens.shape[-1]) if finetune is not None else None

    checkpoint, state, key = None, None, ""
    if checkpoint_dir is not None:
        checkpoint_dir.mkdir(parents=True, exist_ok=True)
        key = fingerprint(
            folder, tokens, lengths, (), scheme=asdict(scheme), search=search.to_dict(),
            finetune=finetune and finetune.to_dict(), val_size=val_size, device=device.type, dtype=dtype,
            true_sequential=true_sequential, kept=kept, seed=seed,
        )  # fmt: skip
        checkpoint = Checkpoint(checkpoint_dir, key, BlockReport)
        state = checkpoint.load()
        if state is None:
            checkpoint.clear()
    stage("embed")
    hint = MemoryHint(device, microbatch or max(1, MICROBATCH_TOKENS // tokens.shape[-1]), tokens.shape[-1], finetune)
    with hint.explained():
        stream = LayerStream(
            architecture, weights, tokens, lengths, device, dtype, microbatch=microbatch, folder=checkpoint_dir,
            memory_limit=memory_limit // 2, start=state["layer"] if state else 0, held_out=val_size,
        )  # fmt: skip
    if state and stream.start:
        writer.restore(state["writers"][0])
        report.layers, report.resumed_at = state["reports"], stream.start
    else:
        if checkpoint is not None:
            checkpoint.clear()
        write_outside(folder, weights, (writer.add,))

    stage("layers")
    codes = FoundCodes(checkpoint_dir, key)
    targets = stream.store("targets")
    plan = Plan(scheme, search, finetune, true_sequential, seed, kept)
    with FitPool(workers) as pool:
        for index in range(report.resumed_at, stream.layers):
            with hint.explained(), stream.layer(index) as layer:
                block = BlockJob(stream, index, layer, targets, plan, pool, codes, hint, writer).run()
            report.layers.append(block)
            tell(block)
            if checkpoint is not None:
                checkpoint.save(index + 1, report.layers, {scheme.label: kept}, [writer.commit()])
                writer.seal()
                codes.clear()
            release_memory()
    targets.close()
    stream.activations.close()
    return report


def _check_split(val_size: int, samples: int) -> None:
    if isinstance(val_size, bool) or not isinstance(val_size, int) or not 0 <= val_size < max(samples, 1):
        raise ConfigError(
            f"found {val_size!r} with {samples} calibration sequences; allowed are whole numbers from 0 to "
            f"{max(samples - 1, 0)}, so that some are left to calibrate on",
            key="val_size",
            value=val_size,
        )
