"""Block finetuning: codebooks, scales and all that is not quantized in a decoder layer learn the dense layer's output.

Source: Egiazarian et al. 2024 (AQLM, arXiv 2401.06118), section 3.4. Codes stay. Differences: the loss is divided by
the energy of what the dense layer adds, so that losses compare between layers, and a loss that is not finite ends the
training with the best parameters so far.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backend.quantize.aqlm.block_data import BlockData
from backend.quantize.aqlm.finetune_settings import FinetuneSettings

EPSILON = 1e-15  # Adam's: a codeword's gradient may be far below its usual 1e-8


@dataclass(frozen=True)
class Finetuned:
    """How the training of one layer went.

    Attributes:
        validation: Relative error on the held-out sequences before the first epoch and after each; empty if none are
            held out.
        best_epoch: Epochs after which the parameters are kept, 0: none.
        notes: What did not go as planned.
    """

    validation: tuple[float, ...]
    best_epoch: int
    notes: tuple[str, ...]


@torch.enable_grad()
def finetune(layer: nn.Module, data: BlockData, settings: FinetuneSettings, seed: int) -> Finetuned:
    """Train all parameters of a layer that are not codes; the best ones are in it afterwards.

    The best are those with the lowest validation error; without held-out sequences, the last ones that are finite.

    Args:
        layer: With `TrainedLinear`s in place of its quantized Linears; float32.
        data: Its inputs and targets.
        settings: How.
        seed: Of the order of the training parts.
    """
    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    parameters = list(layer.parameters())
    optimizer = torch.optim.Adam(parameters, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=EPSILON)
    generator = torch.Generator().manual_seed(seed)
    best, best_epoch, worse, notes = _copy(parameters), 0, 0, []
    curve = [data.relative_error(layer, data.held_out)] if data.held_out else []
    for epoch in range(1, settings.max_epochs + 1):
        finite = _train(layer, data, settings, optimizer, generator)
        if data.held_out and finite:
            curve.append(data.relative_error(layer, data.held_out))
        if not (finite and all(map(math.isfinite, curve)) and all(bool(p.isfinite().all()) for p in parameters)):
            curve = [value for value in curve if math.isfinite(value)]
            notes.append(f"finetuning diverged in epoch {epoch}; the parameters after epoch {best_epoch} are kept")
            break
        if not data.held_out or curve[-1] < min(curve[:-1]):
            best, best_epoch, worse = _copy(parameters), epoch, 0
        else:
            worse += 1
            if worse >= settings.early_stop:
                break
    with torch.no_grad():
        for parameter, value in zip(parameters, best, strict=True):
            parameter.copy_(value)
            parameter.requires_grad_(False).grad = None
    return Finetuned(tuple(curve), best_epoch, tuple(notes))


def _train(
    layer: nn.Module,
    data: BlockData,
    settings: FinetuneSettings,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> bool:
    """One epoch; False as soon as a loss is not finite."""
    order = [data.training[i] for i in torch.randperm(len(data.training), generator=generator).tolist()]
    for batch in data.batches(order, settings.batch_size):
        unit, total = data.unit(batch), torch.zeros(())
        for number in batch:
            loss = data.squared_error(layer, number) / unit
            loss.backward()
            total += loss.detach().cpu()
        if not bool(total.isfinite()):
            return False
        optimizer.step()
        optimizer.zero_grad()
    return True


def _copy(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]
