"""Moves the targets of a layer's later Linears, so that they make up for errors of the earlier ones.

Once v_proj is rounded, o_proj sees an input x' instead of x. The weight that brings its output nearest to W x is
W + W (X - X')^T X' (X'^T X')^-1; that one is rounded instead of W. Source of the idea: least-squares targets of GPFQ
(Lybrand and Saab 2021) and Qronos (Zhang et al. 2025, arXiv 2505.11695). Unlike there, the error starts afresh in each
layer: its inputs are those of the unquantized model, so that all configurations share them.

The regression is a ridge one: damping pulls it back to W where the tokens say little. How much, and whether to move at
all, the second half of the tokens decides on what the first half found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from backend.formats.weight import QuantizedWeight
from backend.quantize.gptq import DAMP_STEP, MAX_DAMP
from backend.quantize.gram import Gram, product
from backend.quantize.stream import LayerStream, call_layer

TOKENS = 16384  # on which inputs are compared
RIDGES = (1.0, 10.0, 100.0)  # times the recipe's damping
JUDGE_ROWS = 256  # rows that decide


class Drift:
    """What rounding some Linears of a layer does to the inputs of others.

    Args:
        stream: Holds a sample of the layer's inputs.
        index: The layer's position.
        layer: The layer, scales folded, nothing rounded. Its weights may change later.
    """

    def __init__(self, stream: LayerStream, index: int, layer: nn.Module) -> None:
        self._stream, self._index, self._layer = stream, index, layer
        self._exact = {name: p.detach().to(stream.dtype, copy=True) for name, p in layer.named_parameters()}

    @torch.no_grad()
    def target(
        self, linear: str, w: Tensor, rounded: Mapping[str, QuantizedWeight], damp: float, columns: Tensor | None
    ) -> Tensor:
        """The weight whose outputs on a Linear's moved input X' are nearest to those of `w` on X.

        Args:
            linear: Its name inside the layer.
            w: (out, in), float32: its weight, or several that share the input.
            rounded: The Linears that are rounded by now.
            damp: As in `corrected`.
            columns: Likewise.

        Returns:
            (out, in); `w` itself where nothing is gained on tokens that the regression did not see.
        """
        weights = {f"{name}.weight": weight.dequantize(self._stream.dtype) for name, weight in rounded.items()}
        gram, drift = Gram(w.shape[1], w.device), torch.zeros(w.shape[1], w.shape[1], device=w.device)
        judged = w[:: -(-len(w) // JUDGE_ROWS)]
        steps: list[Tensor] = []
        gains: list[float] = []
        chunks = list(self._chunks())
        for number, (hidden, text) in enumerate(chunks):
            exact, moved = (self._input(linear, hidden, changed)[text] for changed in ({}, weights))
            if number == len(chunks) // 2:
                steps = [corrected(judged, gram.H, drift, damp * ridge, columns) - judged for ridge in RIDGES]
                gains = [0.0] * len(RIDGES)
            away = exact - moved
            for index, step in enumerate(steps):
                step = step.to(moved.dtype)
                answer, wanted = (moved @ step.T).float(), (away @ judged.T.to(away.dtype)).float()
                gains[index] += float((answer * (2 * wanted - answer)).sum())  # how much nearer the step comes
            gram.add(moved)
            drift += product(away.T, moved)
        best = max(range(len(RIDGES)), key=gains.__getitem__)
        return corrected(w, gram.H, drift, damp * RIDGES[best], columns) if gains[best] > 0 else w

    def _chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The sample in at least two pieces: hidden states on the device, and which of their tokens count."""
        for hidden, text in self._stream.sample:
            counts = (torch.ones(hidden.shape[:2], dtype=torch.bool) if text is None else text).flatten()
            counts = counts.to(self._stream.device)
            if len(self._stream.sample) > 1:
                yield hidden, counts
            else:
                first = torch.arange(len(counts), device=counts.device) < len(counts) // 2
                yield hidden, counts & first
                yield hidden, counts & ~first

    def _input(self, linear: str, hidden: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        """What arrives at a Linear when the layer runs with some weights changed, (tokens, in)."""
        reached: list[Tensor] = []

        def stop(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            reached.append(inputs[0].flatten(0, -2))
            raise _Reached

        def run(*args: object, **kwargs: object) -> Tensor:
            output: Tensor = torch.func.functional_call(self._layer, {**self._exact, **changed}, args, kwargs)
            return output

        handle = self._layer.get_submodule(linear).register_forward_pre_hook(stop)
        try:
            call_layer(run, hidden.to(self._stream.device), self._stream.call(self._index, hidden))
        except _Reached:
            pass
        finally:
            handle.remove()
        return reached[0]


class _Reached(Exception):
    """Ends a run at the Linear in question."""


def corrected(w: Tensor, H: Tensor, drift: Tensor, damp: float, columns: Tensor | None) -> Tensor:  # noqa: N803
    """The weight W + W (X - X')^T X' (X'^T X' + damp)^-1, whose outputs on X' are nearest to those of W on X.

    Args:
        w: (out, in), float32 or float64.
        H: X'^T X', (in, in).
        drift: (X - X')^T X', likewise.
        damp: Part of the mean diagonal of H that is added to the diagonal, more where H stays singular.
        columns: What the columns of `w` were multiplied by, (in,): X and X' are divided by it, the damping, which is
            meant for the inputs as they were, by its square.

    Returns:
        (out, in); `w` itself if nothing moved, or H cannot be factorized.
    """
    if not bool(drift.any()):
        return w
    back = torch.ones_like(H[0]) if columns is None else columns
    ridge = (H.diagonal() * back.square()).mean() / back.square()
    while damp <= MAX_DAMP:
        L, info = torch.linalg.cholesky_ex(H + torch.diag(damp * ridge))  # noqa: N806
        if int(info) == 0:
            step = torch.cholesky_solve((w @ drift).T, L).T
            return w + step if bool(torch.isfinite(step).all()) else w
        damp *= DAMP_STEP
    return w
