"""AQLM's search for the codes, codebooks and scales of one Linear.

The problem is that of Egiazarian et al. 2024 (AQLM, arXiv 2401.06118): minimise tr(D H D^T) for D = W - Q, where the
groups of Q are scaled sums of codewords. `fast` is our procedure, `reference` the published one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from backend.errors import ModelError
from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.fast import search_fast
from backend.quantize.aqlm.metric import check_gram
from backend.quantize.aqlm.presets import REFERENCE, SearchSettings
from backend.quantize.aqlm.reference import search_reference
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.gram import error_energy

MAX_WEIGHT = 2.0**24


@dataclass(frozen=True)
class Fitted:
    """What the search found.

    Attributes:
        weight: Codes, codebooks and scales, float32 with values that float16 holds exactly.
        relative_error: tr(D H D^T) / tr(W H W^T) of that weight on H as it was given; 0 if there is no output.
        notes: What is worth telling.
    """

    weight: AdditiveWeight
    relative_error: float
    notes: tuple[str, ...] = ()


@torch.no_grad()
def fit(W: Tensor, H: Tensor, scheme: AdditiveScheme, settings: SearchSettings, *, seed: int) -> Fitted:  # noqa: N803
    """Quantize the weight of one Linear.

    Deterministic for a seed on one machine with one number of threads. W and H stay as they are.

    Args:
        W: (out, in), float32.
        H: Gram matrix of the inputs, (in, in), float32, on the same device.
        scheme: Which codebooks.
        settings: How hard to try.
        seed: Of all draws.

    Raises:
        ModelError: If the scheme does not fit the shape, W or H is not finite, H not positive semidefinite, or W too
            large for float16.
    """
    out, width = W.shape
    if H.shape != (width, width):
        raise ModelError(f"The Gram matrix is {tuple(H.shape)}, but the weight {out} x {width} has {width} inputs.")
    misfit = scheme.misfit(out, width)
    if misfit is not None:
        raise ModelError(f"{scheme.label} does not fit a weight {out} x {width}: {misfit}.")
    if not bool(torch.isfinite(W).all()):
        raise ModelError("The weight holds values that are not finite.")
    check_gram(H)
    largest = float(W.abs().max())
    if largest > MAX_WEIGHT:
        raise ModelError(f"Weights up to {largest:g} are too large for float16 codebooks; allowed is {MAX_WEIGHT:g}.")
    generator = torch.Generator(W.device).manual_seed(seed)
    if settings.procedure == REFERENCE:
        weight = storable(search_reference(W, H, scheme, settings, generator), 1.0)
        weight.scales.mul_(W.any(1))  # the published program gives rows of zeros small scales
        return Fitted(weight, relative_error(W, weight, H))
    # Scales get squared: near 1, neither small nor large weights are lost.
    unit = 2.0 ** round(math.log2(largest)) if largest > 0 else 1.0
    weight, error, notes = search_fast(W / unit, H, scheme, settings, generator)
    return Fitted(storable(weight, unit), error if largest > 0 and bool(H.any()) else 0.0, notes)


def storable(weight: AdditiveWeight, unit: float) -> AdditiveWeight:
    """A weight times `unit`, a power of two, with codebooks and scales that float16 holds exactly.

    Codebooks and scales get like shares of the whole magnitude, by powers of two: float16 loses digits below 6e-5.
    """
    scales, codebooks = weight.scales.double() * unit, weight.codebooks.double()
    ratio = float(scales.max()) / max(float(codebooks.square().mean().sqrt()), 1e-30)
    shift = 2.0 ** round(math.log2(ratio) / 2) if ratio > 0 else 1.0
    return AdditiveWeight(weight.codes, (codebooks * shift).half().float(), (scales / shift).half().float())


def relative_error(W: Tensor, weight: AdditiveWeight, H: Tensor) -> float:  # noqa: N803
    """Energy of the output error in units of the output's, for W (out, in) and H (in, in); 0 if there is no output."""
    signal = float(error_energy(W, H).sum(dtype=torch.float64))
    error = float(error_energy(weight.dequantize() - W, H).sum(dtype=torch.float64))
    return error / signal if signal > 0 else 0.0
