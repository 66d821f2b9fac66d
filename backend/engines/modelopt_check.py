"""Whether a folder that modelopt exported is the model that it had in memory.

Rounding of inputs makes two computations of one model drift apart: a last digit decides which way a value is rounded,
and the next layers see the difference. So every Linear is checked on the very inputs that it had in memory, and the
logits, over all layers, only have to differ by less than quantizing has changed them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backend.errors import CheckpointError

TOKENS = 64
LINEAR_TOLERANCE = 0.02
"""Largest difference of a Linear's outputs, relative to them. Scales in 16 bits make some thousandths of it, by other
rounding of inputs; a scale in a wrong place, or weights in a wrong order, make more than 0.2."""
LOGITS_TOLERANCE = 0.01
"""The same for the logits where inputs are not rounded: embeddings, norms and head are stored in 16 bits."""


@dataclass(frozen=True)
class Observed:
    """What a model in memory has computed.

    Attributes:
        linears: Quantized Linear -> its inputs (tokens, in) and outputs (tokens, out).
        logits: (tokens, vocabulary) float32.
        changed: How far quantizing has moved the logits, relative to them.
    """

    linears: dict[str, tuple[Tensor, Tensor]]
    logits: Tensor
    changed: float


def probe_of(rows: list[Tensor], device: str) -> Tensor:
    """The first tokens of the calibration text, (1, tokens)."""
    return rows[0][None, :TOKENS].to(device)


@torch.no_grad()
def logits(model: Any, probe: Tensor) -> Tensor:
    """(tokens, vocabulary) float32 on the CPU."""
    return model(probe, use_cache=False).logits[0].float().cpu()


def observe(model: nn.Module, probe: Tensor, original: Tensor) -> Observed:
    """Run the quantized model in memory.

    Args:
        model: With modelopt's quantizers, its scales merged as for the export.
        probe: (1, tokens).
        original: The logits before quantizing.
    """
    names = [
        name
        for name, module in model.named_modules()
        if getattr(getattr(module, "weight_quantizer", None), "is_enabled", False)
    ]
    linears: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str) -> None:
        linears[name] = (args[0][0].detach().cpu(), output[0].detach().cpu())

    with _hooks(model, names, keep):
        found = logits(model, probe)
    return Observed(linears, found, _difference(found, original))


@torch.no_grad()
def check_reload(model: Any, probe: Tensor, expected: Observed) -> dict[str, float]:
    """Compare the model that was read from the folder.

    Args:
        model: Loaded by our reader, in the same type and on the same device.
        probe: The same tokens.
        expected: Of the model in memory.

    Returns:
        `linear_difference` (the largest), `logits_difference`, `logits_changed` (by quantizing), relative.

    Raises:
        CheckpointError: If it computes something else; with the Linear that differs most.
    """
    worst, most = "", 0.0
    for name, (inputs, outputs) in expected.linears.items():
        again = model.get_submodule(name)(inputs.to(probe.device)).float().cpu()
        difference = float((again - outputs.float()).norm() / outputs.float().norm())
        if not difference <= most:  # NaN too
            worst, most = name, difference
    _expect(most, LINEAR_TOLERANCE, f"{worst} computes other outputs than in memory")
    rounds = any(getattr(module, "rounding", "") for module in model.modules())
    tolerance = max(LOGITS_TOLERANCE, expected.changed) if rounds else LOGITS_TOLERANCE
    difference = _difference(logits(model, probe), expected.logits)
    _expect(difference, tolerance, "the whole model gives other logits than in memory")
    return {"linear_difference": most, "logits_difference": difference, "logits_changed": expected.changed}


def _expect(found: float, allowed: float, what: str) -> None:
    if not found <= allowed:
        raise CheckpointError(
            f"read back from the export, {what}: they differ by {found:.3g} of their size, allowed is {allowed:.3g}. "
            "Nothing was published. Please report this with the model and the method"
        )


def _difference(found: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, relative to the expected logits around their mean."""
    centred = expected - expected.mean(-1, keepdim=True)
    return float((found - found.mean(-1, keepdim=True) - centred).norm() / centred.norm())


@contextmanager
def _hooks(model: nn.Module, names: list[str], hook: Callable[..., None]) -> Iterator[None]:
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name=name)) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
