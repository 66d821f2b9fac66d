"""What the base model predicts for the sequences of tuning.

Where the head's inputs fit in memory or on the disk, the base model runs once, before the student exists, and its head
alone stays: a microbatch then costs a product with the head instead of a forward pass, and the two models are never in
memory together.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from backend.formats.loader import load_model
from backend.quantize.activations import Activations
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.settings import MICROBATCH_TOKENS


class Teacher(Protocol):
    """The base model's predictions."""

    def logits(self, rows: list[int]) -> Tensor:
        """Of some sequences, by their indices: (n, L, vocabulary) on the device."""


class LiveTeacher:
    """Runs the base model whenever it is asked.

    Args:
        model: It.
        tokens: The sequences, (samples, L).
    """

    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self._model, self._tokens = model, tokens

    @torch.no_grad()
    def logits(self, rows: list[int]) -> Tensor:
        """See `Teacher`."""
        device = next(self._model.parameters()).device
        logits: Tensor = self._model(input_ids=self._tokens[rows].to(device), use_cache=False).logits
        return logits


class RecordedTeacher:
    """Runs the base model's head on its recorded inputs.

    Args:
        head: It.
        states: The head's inputs, one part (1, L, width) per sequence.
    """

    def __init__(self, head: nn.Module, states: Activations) -> None:
        self._head, self._states = head, states

    @torch.no_grad()
    def logits(self, rows: list[int]) -> Tensor:
        """See `Teacher`."""
        device = next(self._head.parameters()).device
        logits: Tensor = self._head(torch.cat([self._states.read(row) for row in rows]).to(device))
        return logits


def make_teachers(
    folder: Path,
    texts: dict[str, Tensor],
    *,
    device: torch.device,
    dtype: torch.dtype,
    group: Group,
    work: Path,
    memory_limit: int,
) -> tuple[dict[str, Teacher], str | None]:
    """Load the base model and record its predictions, if that is possible.

    Args:
        folder: The base model.
        texts: Sequences by name, each (samples, L).
        device: Where to compute.
        dtype: Type of its weights and passes.
        group: The processes that share the work.
        work: A folder that they share, for what memory does not hold.
        memory_limit: Bytes of recorded states above which they lie in files.

    Returns:
        A teacher for each text, and why the base model has to run in every step, or None.
    """
    model = load_model(folder, device, dtype)
    head = model.get_output_embeddings()
    inputs: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    reason = _obstacle(model, head, inputs, texts, work, memory_limit)
    if reason is not None:
        hook.remove()
        return {name: LiveTeacher(model, tokens) for name, tokens in texts.items()}, reason
    teachers: dict[str, Teacher] = {}
    for name, tokens in texts.items():
        states = _record(model, inputs, tokens, group, work / name, memory_limit)
        teachers[name] = RecordedTeacher(head, states)
    hook.remove()
    return teachers, None


@torch.no_grad()
def _obstacle(
    model: nn.Module, head: nn.Module, inputs: list[Tensor], texts: dict[str, Tensor], work: Path, memory_limit: int
) -> str | None:
    """Why recording is impossible, found by trying it on some tokens."""
    device = next(model.parameters()).device
    some = next(iter(texts.values()))[:1].to(device)
    inputs.clear()
    logits = model(input_ids=some, use_cache=False).logits
    if len(inputs) != 1 or not torch.equal(head(inputs[0]).float(), logits.float()):
        return "it changes the head's outputs"
    nbytes = inputs[0][0, 0].numel() * inputs[0].element_size() * sum(text.numel() for text in texts.values())
    inputs.clear()
    free = shutil.disk_usage(work).free
    if nbytes > memory_limit and nbytes > free // 2:
        return f"its last hidden states take {nbytes / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of the disk are free"
    return None


@torch.no_grad()
def _record(
    model: nn.Module, inputs: list[Tensor], tokens: Tensor, group: Group, folder: Path, memory_limit: int
) -> Activations:
    """Run the base model over all sequences, each process over its part, and keep the head's inputs."""
    device = next(model.parameters()).device
    at_once = max(1, MICROBATCH_TOKENS // tokens.shape[1])
    states: Activations | None = None
    batches = torch.arange(len(tokens)).split(at_once)
    for number, rows in enumerate(batches):
        if number % group.size != group.rank and states is not None:
            continue
        inputs.clear()
        model(input_ids=tokens[rows].to(device), use_cache=False)
        found = inputs.pop()
        if states is None:
            shapes = [(1, tokens.shape[1], found.shape[-1])] * len(tokens)
            limit = memory_limit if group.size == 1 else 0  # what one process keeps in memory the others do not see
            states = Activations(shapes, found.dtype, folder, limit)
        if number % group.size == group.rank:
            for row, state in zip(rows.tolist(), found.cpu(), strict=True):
                states.write(row, state[None], first=True)
    assert states is not None
    group.wait()
    return states
