"""A tuning as plain data: what the processes that share it are told, and what the first of them answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import ConfigError, DataError
from backend.files import write_json
from backend.formats.skeleton import read_config
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.memory import explained
from backend.quantize.aqlm.tune.progress import History, Progress
from backend.quantize.aqlm.tune.report import StepReport
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.aqlm.tune.student import Student, amp_dtype
from backend.quantize.aqlm.tune.teacher import make_teachers
from backend.quantize.aqlm.tune.tuner import Text, Tuner
from backend.quantize.architecture import describe
from backend.quantize.checkpoint import fingerprint

TOKENS = "tokens.safetensors"


@dataclass(frozen=True)
class TuneJob:
    """What to tune, on which text, and how.

    Attributes:
        base: Folder of the 16-bit model.
        quantized: Folder of its AQLM checkpoint.
        train: (samples, L), int64.
        validation: (samples, L), int64; L may be another one.
        settings: How.
        device: `cpu` or `cuda`.
        work: Folder for progress, the best model, and what memory does not hold.
        save_states: Whether a later process is to be able to go on.
        memory_limit: Bytes of the base model's last hidden states above which they lie on disk.
    """

    base: Path
    quantized: Path
    train: Tensor
    validation: Tensor
    settings: TuneSettings
    device: str
    work: Path
    save_states: bool
    memory_limit: int

    def key(self, processes: int) -> str:
        """Digest of all that decides the result."""
        quantized = fingerprint(self.quantized, self.validation, None, ())
        return fingerprint(
            self.base, self.train, None, (), quantized=quantized, settings=self.settings.to_dict(),
            device=torch.device(self.device).type, processes=processes,
            amp=str(amp_dtype(self.settings, torch.device(self.device))),
        )  # fmt: skip

    def write(self, folder: Path) -> Path:
        """Store it for other processes; returns the file to `read`."""
        save_file({"train": self.train.contiguous(), "validation": self.validation.contiguous()}, folder / TOKENS)
        facts = {
            "base": str(self.base), "quantized": str(self.quantized), "settings": self.settings.to_dict(),
            "device": self.device, "work": str(self.work), "save_states": self.save_states,
            "memory_limit": self.memory_limit,
        }  # fmt: skip
        write_json(folder / "job.json", facts)
        return folder / "job.json"

    @classmethod
    def read(cls, file: Path) -> TuneJob:
        """The inverse of `write`."""
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts |= {key: Path(facts[key]) for key in ("base", "quantized", "work")}
        facts["settings"] = TuneSettings.from_dict(facts["settings"])
        return cls(**facts, **load_file(file.parent / TOKENS))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What came out, beside the best model, which lies in the job's folder.

    Attributes:
        history: All that has happened.
        resumed_at: Step at which it was taken up.
    """

    history: History
    resumed_at: int


def run(
    job: TuneJob,
    group: Group,
    device: torch.device,
    *,
    on_step: Callable[[StepReport], None],
    on_stage: Callable[[str], None],
) -> Outcome:
    """Tune, as one of the processes of a group. All of them return the same.

    Args:
        job: What.
        group: The processes.
        device: This one's.
        on_step: Called after each step.
        on_stage: Called with `teacher`, `load`, `tune`.

    Raises:
        ConfigError: If `block_type` is no class of the model's decoder layers.
        DataError: If a token is not the model's.
        ModelError: If a model is of a kind that is not supported, or what it predicts is not finite.
        CheckpointError: If files are broken, or the disk is full.
        EngineError: If memory runs out.
    """
    settings = job.settings
    texts = {"train": job.train, "validation": job.validation}
    _check(job)
    progress = Progress(job.work, job.key(group.size), group)
    before = progress.load()
    resumed_at = before.step if before else 0
    if before is not None and before.finished:
        return Outcome(before, resumed_at)
    with explained(settings, group.size, job.train.shape[1], device):
        on_stage("teacher")
        teachers, live = make_teachers(
            job.base, texts, device=device, dtype=amp_dtype(settings, device), group=group, work=job.work,
            memory_limit=job.memory_limit,
        )  # fmt: skip
        on_stage("load")
        student = Student(job.quantized, settings, device, group)
        on_stage("tune")
        train, validation = (Text(tokens, teachers[name]) for name, tokens in texts.items())
        tuner = Tuner(
            student, train, validation, settings, group, device, progress, save_states=job.save_states, tell=on_step
        )
        notes = [f"the base model ran in every step, since {live}"] if live else []
        return Outcome(tuner.run(notes), resumed_at)


def _check(job: TuneJob) -> None:
    """What can be refused before a weight is read."""
    architecture = describe(read_config(job.base), torch.float32)
    found = type(architecture.layers[0]).__name__
    block_type = job.settings.block_type
    if block_type not in (None, found):
        raise ConfigError(
            f"found {block_type!r}; the decoder layers of {architecture.name} are {found}; set that, or leave it empty",
            key="block_type",
            value=block_type,
        )
    for name, tokens in (("training", job.train), ("validation", job.validation)):
        if int(tokens.min()) < 0 or int(tokens.max()) >= architecture.vocabulary:
            raise DataError(
                f"The {name} tokens go from {int(tokens.min())} to {int(tokens.max())}, but the model knows "
                f"{architecture.vocabulary}; was the text tokenized with another model's tokenizer?"
            )
