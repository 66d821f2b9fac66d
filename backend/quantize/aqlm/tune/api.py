"""PV-tuning of an AQLM checkpoint: from its folder and the base model's to a checkpoint writer."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from backend.errors import DataError
from backend.formats.additive_reader import read_unquantized
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.aqlm import PARTS
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order
from backend.formats.skeleton import match_tensors, read_config
from backend.quantize.activations import MEMORY_LIMIT
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.job import Outcome, TuneJob, run
from backend.quantize.aqlm.tune.launch import launch
from backend.quantize.aqlm.tune.progress import Progress
from backend.quantize.aqlm.tune.report import StepReport, TuneReport
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.aqlm.tune.student import amp_dtype
from backend.quantize.architecture import describe


class Writer(Protocol):
    """Takes the tensors of an artefact; `backend.formats.writer.CheckpointWriter` with layout `aqlm` is one."""

    def add(self, name: str, tensor: Tensor, source_dtype: torch.dtype | None = None) -> None:
        """One unquantized tensor."""

    def add_additive(self, prefix: str, weight: AdditiveWeight, bias: Tensor | None = None) -> None:
        """One Linear of codebooks."""


def tune(
    base_dir: Path | str,
    quantized_dir: Path | str,
    train_tokens: Tensor,
    val_tokens: Tensor,
    settings: TuneSettings,
    writer: Writer,
    *,
    device: torch.device | str = "cpu",
    checkpoint_dir: Path | None = None,
    processes: int = 1,
    memory_limit: int = MEMORY_LIMIT,
    on_step: Callable[[StepReport], None] | None = None,
    on_stage: Callable[[str], None] | None = None,
) -> TuneReport:
    """Draw a quantized model's predictions to those of its base model.

    The model with the lowest divergence on `val_tokens` is kept, the given one included. A loss that is not finite
    ends the tuning, not the job. The artefact is the same, bit for bit, as if the run had not been interrupted, on one
    machine with one number of threads; on CUDA it is alike. The caller finishes the writer, with the report's `kept`.

    Args:
        base_dir: Folder of the 16-bit model.
        quantized_dir: Folder of its AQLM checkpoint.
        train_tokens: What is learned on, (samples, L), int64.
        val_tokens: What decides which step's model is kept, (samples, L), int64; no part of any test text.
        settings: How.
        writer: Receives the artefact's tensors, in a fixed order.
        device: `cpu`, or `cuda`: with several processes each takes the device of its number.
        checkpoint_dir: Where progress is kept so that the same call can go on after an interruption; None: nowhere.
        processes: That share the work on this machine, started with torchrun.
        memory_limit: Bytes of the base model's last hidden states above which they lie on disk.
        on_step: Called after each step, and once before the first.
        on_stage: Called with `teacher`, `load`, `tune`, `save`.

    Raises:
        ConfigError: If the batch cannot be shared out, is larger than the text, or `block_type` is not the model's.
        DataError: If there are no tokens, or they are not the model's.
        ModelError: If a model is of a kind that is not supported, or its predictions are not finite.
        CheckpointError: If files are broken, or the disk is full.
        EngineError: If memory runs out, or a process fails.
    """
    stage = on_stage or (lambda name: None)
    tell = on_step or (lambda report: None)
    for name, tokens in (("train", train_tokens), ("validation", val_tokens)):
        if tokens.dim() != 2 or tokens.numel() == 0:
            raise DataError(f"The {name} tokens have shape {tuple(tokens.shape)}; (samples, length) is expected.")
    settings.steps(len(train_tokens))
    settings.microbatch(processes, train_tokens.shape[1])
    with ExitStack() as stack:
        work = checkpoint_dir or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantdeck-")))
        work.mkdir(parents=True, exist_ok=True)
        job = TuneJob(
            Path(base_dir), Path(quantized_dir), train_tokens, val_tokens, settings, str(device), work,
            save_states=checkpoint_dir is not None, memory_limit=memory_limit,
        )  # fmt: skip
        if processes == 1:
            outcome = run(job, Group(), torch.device(device), on_step=tell, on_stage=stage)
        else:
            outcome = launch(job, processes, on_step=tell, on_stage=stage)
        stage("save")
        _write(job, processes, outcome, writer)
    return _report(job, processes, outcome)


def _write(job: TuneJob, processes: int, outcome: Outcome, writer: Writer) -> None:
    """The best model: every tensor of the quantized checkpoint in its order, as it was tuned."""
    best = Progress(job.work, job.key(processes), Group()).best(outcome.history.best_step)
    unquantized = dict(read_unquantized(job.quantized))
    mark = f".{PARTS[0]}"
    prefixes = [name.removesuffix(mark) for name in best if name.endswith(mark)]
    biases = {f"{prefix}.bias" for prefix in prefixes}
    places = {name: name for name in unquantized if name not in biases} | {f"{p}.weight": p for p in prefixes}
    for place, name in sorted(places.items(), key=lambda item: artefact_order(item[0])):
        if place == name:
            writer.add(name, best.get(name, unquantized[name]))
        else:
            writer.add_additive(name, AdditiveWeight(*(best[f"{name}.{p}"] for p in PARTS)), best.get(f"{name}.bias"))


def _kept(folder: Path) -> list[str]:
    """Linears of the decoder layers that a checkpoint holds unquantized, by name in the model."""
    architecture = describe(read_config(folder), torch.float32)
    stored = {info.name for info in read_headers(folder)}
    dense = match_tensors(architecture.model, [n for n in stored if n.rpartition(".")[2] not in PARTS]).stored
    names = (
        f"{architecture.layers_path}.{index}.{name}"
        for index in range(len(architecture.layers))
        for name in architecture.linears(index)
    )
    return [name for name in names if f"{name}.weight" in dense]


def _report(job: TuneJob, processes: int, outcome: Outcome) -> TuneReport:
    history = outcome.history
    notes = list(history.notes)
    if history.best_step == 0:
        notes.append("no step came nearer to the base model on the validation text; the model is as it was given")
    return TuneReport(
        losses=tuple(history.losses),
        validation=tuple(history.measurements),
        changed=tuple(history.changed),
        best_step=history.best_step,
        steps=history.step,
        stopped=history.stopped,
        kept=dict.fromkeys(_kept(job.quantized), "it is not quantized in the model that was tuned"),
        notes=tuple(notes),
        tokens=job.train.numel(),
        validation_tokens=job.validation.numel(),
        device=job.device,
        amp_dtype=str(amp_dtype(job.settings, torch.device(job.device))).split(".")[1],
        processes=processes,
        resumed_at=outcome.resumed_at,
    )
