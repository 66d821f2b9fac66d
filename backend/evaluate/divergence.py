"""How far a quantized model's predictions are from its base model's: KL divergence and changed top-1 predictions.

Both models read the same windows, and their logits are compared batch by batch, so that never more than two batches
are held. If only one model fits into memory at a time, the base model's logits of some windows wait in a file, as the
model gave them, until the quantized model has been loaded; the numbers are the same.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor
from transformers import PreTrainedModel

from backend.disk import free_bytes
from backend.errors import CheckpointError
from backend.evaluate.perplexity import Windows, logits_batch, scored_logits

CHUNK = {"cpu": 2**19, "cuda": 2**26}
"""Logits that are turned into float32 at once: on a CPU few enough to stay in its caches (measured: 6 times faster)."""
SPOOL_BYTES = 10 * 2**30
"""Most that a file of waiting logits takes: 64 windows of 512 with a vocabulary of 128k are 8.6 GB."""

OpenModel = Callable[[], PreTrainedModel]
Kind = tuple[torch.Size, torch.dtype]


@dataclass
class Divergence:
    """What was measured of each window, in their order.

    Attributes:
        kl: Mean over the window's positions of KL(base ‖ quantized), nats per token.
        flips: Share of its positions at which the most likely next token is another one.
    """

    kl: list[float] = field(default_factory=list)
    flips: list[float] = field(default_factory=list)


@torch.inference_mode()
def position_divergence(base: Tensor, quantized: Tensor) -> tuple[Tensor, Tensor]:
    """KL(base ‖ quantized) of every prediction, and whether its top-1 differs.

    The sum is taken over p (e^d - 1 - d) with d = log q - log p: equal to KL, since p and q both sum to 1, but every
    term is positive and rounding errors of the logarithms enter as their squares, so that float32 is exact enough for
    a KL of 1e-6.

    Args:
        base: Logits (positions, vocab), of any floating type.
        quantized: The other model's logits of the same positions.

    Returns:
        KL in nats, float64 (positions,), and flips, bool (positions,).
    """
    rows = max(1, CHUNK.get(base.device.type, CHUNK["cuda"]) // base.shape[-1])
    kl, flips = [], []
    for one, other in zip(base.split(rows), quantized.split(rows), strict=True):
        log_p, log_q = one.float().log_softmax(-1), other.float().log_softmax(-1)
        d, p = log_q - log_p, log_p.exp()
        # Far above 1, e^d may overflow where p has vanished; there the difference loses no digits.
        terms = torch.where(d < 1, p * (d.expm1() - d), log_q.exp() - p * (1 + d))
        kl.append(terms.sum(-1, dtype=torch.float64).clamp(min=0))  # rounding may leave -1e-15 of nothing
        flips.append(one.argmax(-1) != other.argmax(-1))
    return torch.cat(kl), torch.cat(flips)


def add_batch(found: Divergence, base: Tensor, quantized: Tensor) -> None:
    """Compare the logits (windows, positions, vocab) of some windows, and append what comes out.

    Raises:
        CheckpointError: If the vocabularies differ, or outputs are not finite.
    """
    if base.shape != quantized.shape:
        raise CheckpointError(
            f"The quantized model predicts {quantized.shape[-1]} tokens and its base model {base.shape[-1]}; they are "
            "not of one vocabulary and cannot be compared."
        )
    for one, other in zip(base, quantized, strict=True):
        kl, flips = position_divergence(one, other)
        mean = kl.mean().item()
        if not 0 <= mean < float("inf"):
            raise CheckpointError(
                f"Window {len(found.kl)} has no finite KL divergence: a model's outputs overflow or its weights are "
                "damaged. Quantize it again or use dtype float32."
            )
        found.kl.append(mean)
        found.flips.append(flips.double().mean().item())


def compare_together(
    open_base: OpenModel,
    open_quantized: OpenModel,
    windows: Windows,
    *,
    batch_size: int = 8,
    on_step: Callable[[int], None] | None = None,
) -> Divergence:
    """Compare two models that are in memory at the same time.

    Args:
        open_base: Loads the model that the other one was made from, in eval mode.
        open_quantized: Loads the other one.
        windows: What both read.
        batch_size: Windows per forward pass; lowered where their logits would take too much memory.
        on_step: Called with the number of windows done.

    Raises:
        CheckpointError: If the vocabularies differ, or outputs are not finite.
    """
    base, quantized = open_base(), open_quantized()
    batch_size = logits_batch(base, windows, batch_size)
    found = Divergence()
    pairs = zip(_logits(base, windows, batch_size), _logits(quantized, windows, batch_size), strict=True)
    for one, other in pairs:
        add_batch(found, one, other)
        if on_step:
            on_step(len(found.kl))
    return found


def compare_in_turns(
    open_base: OpenModel,
    open_quantized: OpenModel,
    windows: Windows,
    *,
    spool_dir: Path,
    batch_size: int = 8,
    spool_bytes: int = SPOOL_BYTES,
    on_step: Callable[[int], None] | None = None,
) -> Divergence:
    """Compare two models of which one at a time is in memory; as many rounds as the file of logits makes necessary.

    Args:
        open_base: Loads the base model; called once per round.
        open_quantized: Loads the other one.
        windows: What both read.
        spool_dir: Folder for the file. It has no name, so that nothing is left however the process ends.
        batch_size: Windows per forward pass; lowered where their logits would take too much memory.
        spool_bytes: Size that the file may have; never more than half of the free disk.
        on_step: Called with the number of forward passes done, counted in windows: twice that of the windows at last.

    Raises:
        CheckpointError: If the vocabularies differ, or outputs are not finite.
    """
    count, found, done = len(windows.tokens), Divergence(), 0

    def step(more: int) -> None:
        nonlocal done
        done += more
        if on_step:
            on_step(done)

    while (first := len(found.kl)) < count:
        with TemporaryFile(dir=spool_dir) as spool:
            model = open_base()
            batch = logits_batch(model, windows, batch_size)
            room, kept = min(spool_bytes, free_bytes(spool_dir) // 2), list[Kind]()
            for logits in _logits(model, _part(windows, first, count), batch):
                _write(spool, logits)
                kept.append((logits.shape, logits.dtype))
                step(len(logits))
                if spool.tell() + logits.nbytes > room:
                    break
            del model
            free_memory()
            spool.seek(0)
            model = open_quantized()
            part = _part(windows, first, first + sum(shape[0] for shape, _ in kept))
            for kind, logits in zip(kept, _logits(model, part, batch), strict=True):
                add_batch(found, _read(spool, *kind).to(logits.device), logits)
                step(len(logits))
            del model
            free_memory()
    return found


def _part(windows: Windows, first: int, end: int) -> Windows:
    return replace(windows, tokens=windows.tokens[first:end])


def _logits(model: PreTrainedModel, windows: Windows, batch_size: int) -> Iterator[Tensor]:
    return (logits for _, logits in scored_logits(model, windows, batch_size))


def _write(spool: IO[bytes], logits: Tensor) -> None:
    spool.write(logits.contiguous().cpu().view(torch.uint8).numpy().data)


def _read(spool: IO[bytes], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(bytearray(spool.read(shape.numel() * dtype.itemsize)), dtype=dtype).view(shape)


def free_memory() -> None:
    """Give the memory of a dropped model back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
