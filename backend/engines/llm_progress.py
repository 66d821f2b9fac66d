"""Follows a run of llm-compressor, which has no callbacks: layers, errors and fallbacks become our events.

Taps, all put back afterwards:
- the progress bar over the calibration batches tells layer, batch and pass (`(3/9): Calibrating`);
- the call at the end of each layer closes that layer's row;
- the solvers of GPTQ and SparseGPT and AWQ's search are called with what a relative output error needs;
- warnings of its log become notes of the result, since most of them are said nowhere else.

Errors are relative output errors, ||(W - Q)X||^2 / ||WX||^2 summed over a layer's Linears. GPTQ and SparseGPT report
the numerator themselves, half the trace of (W - Q) H (W - Q)^T with H = 2 XX^T / n; AWQ reports the mean squared error
of the block its scale acts on, put here in relation to that block's mean square output. Round to nearest on the same
grid is measured beside GPTQ.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from backend.errors import EngineError
from backend.event_stream import EventWriter

UNIT = "relative output error"
BATCH_EVERY_S = 2.0
NOT_WORTH_A_NOTE = ("No accelerator available", "Calibration pipeline is set", "Disabling tokenizer parallelism")
LAYER_NAME = re.compile(r"^(.*?\.\d+)(?:\.|$)")
FELL_BACK = "the Hessian could not be inverted, so it was rounded to nearest"
FELL_BACK_SPARSE = "the Hessian could not be inverted, so weights were dropped by size alone"


class _Squared:
    """What is known of one Linear or block: squared output errors beside the squared output."""

    def __init__(self, output: float, error: float | None = None, rtn: float | None = None) -> None:
        self.output, self.error, self.rtn = output, error, rtn
        self.notes: list[str] = []


class Watch:
    """Watches one `oneshot` call.

    Args:
        model: The model that is compressed.
        passes: How many modifiers read the calibration text; each goes through all layers.
        events: Takes progress events.
        configuration: Name of the configuration for the events.

    Attributes:
        layers: One row per decoder layer of the last pass that measured it: `layer`, `error`, `rtn_error`, `notes`.
        notes: What has to be told with the result.
        forward_s: Seconds spent in forward passes over the calibration text.
        place: Where the run is, in words, for error messages.
    """

    def __init__(self, model: nn.Module, passes: int, events: EventWriter, configuration: str) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._passes, self._events, self._configuration = passes, events, configuration
        self._finished = self._subgraph = self._subgraphs = 0
        self._shown_at = 0.0
        self._solved: list[_Squared] = []  # by the solver, waiting for their modules' names
        self._measured: dict[str, list[_Squared]] = {}  # decoder layer: its Linears or blocks in this pass
        self._pruning: nn.Module | None = None
        self._rows: dict[str, dict[str, Any]] = {}
        self.notes: list[str] = []
        self.forward_s = 0.0
        self.place = "the start"

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Rows in the order of the model."""
        return list(self._rows.values())

    @contextmanager
    def following(self) -> Iterator[None]:
        """Put the taps in, and take them out at the end."""
        from llmcompressor.core import LifecycleCallbacks
        from llmcompressor.modifiers.gptq import base as gptq
        from llmcompressor.modifiers.pruning.sparsegpt import base as sparsegpt
        from llmcompressor.modifiers.transform.awq import base as awq
        from llmcompressor.pipelines import cache
        from llmcompressor.pipelines.sequential import pipeline
        from llmcompressor.utils.metric_logging import CompressionLogger
        from loguru import logger

        finish_layer = LifecycleCallbacks.sequential_epoch_end
        taps: list[tuple[Any, str, Any]] = [
            (pipeline, "tqdm", self._batches),
            (cache, "tqdm", _Silent),
            (awq, "tqdm", _Silent),
            (LifecycleCallbacks, "sequential_epoch_end", self._after_layer(finish_layer)),
            (gptq, "quantize_weight", self._around_gptq(gptq.quantize_weight)),
            (sparsegpt, "sparsify_weight", self._around_sparsegpt(sparsegpt.sparsify_weight)),
            (awq.AWQModifier, "_compute_best_scale", self._around_awq(awq.AWQModifier._compute_best_scale)),
            (CompressionLogger, "set_results", self._around_result(CompressionLogger.set_results)),
        ]
        with ExitStack() as stack:
            for owner, name, tap in taps:
                stack.callback(setattr, owner, name, owner.__dict__[name])
                setattr(owner, name, tap)
            sink = logger.add(self._log, level="WARNING", format="{message}", filter=lambda r: r["level"].no != 38)
            stack.callback(logger.remove, sink)
            yield

    # -- progress

    def _batches(self, batches: Iterable[Any], total: int = 0, desc: str = "", **_: Any) -> Iterator[Any]:
        if found := re.match(r"\((\d+)/(\d+)\): (\w+)", desc):
            self._subgraph, self._subgraphs = int(found[1]), int(found[2])
        doing = "reading the text" if desc.endswith("Calibrating") else "passing on"
        began = time.perf_counter()
        for number, batch in enumerate(batches):
            self.place = f"part {self._subgraph} of {self._subgraphs}, sequence {number + 1} of {total}"
            if time.monotonic() - self._shown_at > BATCH_EVERY_S:
                self._note(self._step - 1, f"{doing}: {self.place}")
            yield batch
        self.forward_s += time.perf_counter() - began

    @property
    def _step(self) -> int:
        """Parts (decoder layers and what surrounds them) that are done after this one, over all passes."""
        return self._finished * self._subgraphs + self._subgraph

    def _note(self, step: int, message: str, **more: Any) -> None:
        self._shown_at = time.monotonic()
        known = {"step": step, "total": self._passes * self._subgraphs} if self._subgraphs else {}
        self._events.note(stage="quantize", message=message, configuration=self._configuration, **known, **more)

    def _after_layer(self, finish: Callable[..., Any]) -> Any:
        def finish_and_tell(modules: list[nn.Module], **more: Any) -> Any:
            names = [self._names.get(id(module), "") for module in modules]
            layers = dict.fromkeys(found[1] for name in names if (found := LAYER_NAME.match(name)))
            self.place = " to ".join(list(layers)[:: max(len(layers) - 1, 1)]) or "the last part of the model"
            result = finish(modules, **more)
            for layer in dict.fromkeys([*self._measured, *layers]):
                self._tell_layer(layer, self._measured.pop(layer, []))
            if self._subgraphs and self._subgraph == self._subgraphs:
                self._finished, self._subgraph = self._finished + 1, 0
            return result

        return staticmethod(finish_and_tell)

    def _tell_layer(self, layer: str, parts: list[_Squared]) -> None:
        if not parts:
            return self._note(self._step, f"{layer} done")
        notes = [note for part in parts for note in part.notes]
        row = {
            "layer": layer,
            "error": _relative(parts, lambda p: p.error),
            "rtn_error": _relative(parts, lambda p: p.rtn),
            "notes": notes,
        }
        self._rows[layer] = row
        self.notes += notes
        return self._note(self._step, f"{layer} done", unit=UNIT, **row)

    # -- errors

    def _around_gptq(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        def measured(**given: Any) -> Any:
            weights, hessians = given["weights"], given["hessians"]  # (batch, out, in), (batch, in, in); both used up
            found = [_before_gptq(index, given) for index in range(len(weights))]
            finite = [bool(hessians[index].isfinite().all()) for index in range(len(weights))]
            quantized, losses, fell_back = solve(**given)
            for index, part in enumerate(found):
                # With the identity for H the loss is no output error; what was done is rounding to nearest.
                part.error = part.rtn if fell_back[index] else float(losses[index])
                part.notes = [FELL_BACK] if fell_back[index] else []
                part.output = part.output if finite[index] else float("nan")
            self._solved += found
            return quantized, losses, fell_back

        return measured

    def _around_sparsegpt(self, solve: Callable[..., Any]) -> Callable[..., Any]:
        def measured(**given: Any) -> Any:
            self._pruning = given["module"]
            weight = given["module"].weight.float()
            part = _Squared(_output(weight, given["hessians_dict"][given["module"]]))
            self._solved.append(part)
            loss, sparse = solve(**given)
            part.error = None if part.notes else float(loss)
            self._pruning = None
            return loss, sparse

        return measured

    def _around_awq(self, search: Callable[..., Any]) -> Callable[..., Any]:
        def measured(modifier: Any, mapping: Any, outputs: list[Tensor], *more: Any) -> Any:
            count = sum(output.numel() for output in outputs)
            square = sum(float(output.float().square().sum()) for output in outputs) / max(count, 1)
            scales = search(modifier, mapping, outputs, *more)
            part = _Squared(square, error=float(modifier._error_metrics[-1]["best_error"]))
            self._keep(mapping.smooth_name, part)
            return scales

        return measured

    def _around_result(self, report: Callable[..., None]) -> Callable[..., None]:
        def reported(logger: Any, *given: Any, **named: Any) -> None:
            if self._solved:
                self._keep(self._names.get(id(logger.module), "a Linear"), self._solved.pop(0))
            report(logger, *given, **named)

        return reported

    def _keep(self, name: str, part: _Squared) -> None:
        if not part.output < float("inf"):
            raise EngineError(
                f"{name}: its calibration activations hold NaN or infinity; check the model's weights, or use a "
                "shorter SEQUENCE_LENGTH or other text"
            )
        part.notes = [f"{name}: {note}" for note in part.notes]
        found = LAYER_NAME.match(name)
        self._measured.setdefault(found[1] if found else name, []).append(part)

    def _log(self, message: Any) -> None:
        text = " ".join(str(message).split())
        if text.startswith("Failed to invert hessian") and self._pruning is not None and self._solved:
            self._solved[-1].notes = [FELL_BACK_SPARSE]
        elif text.startswith("Hessian inversion failed") or text.startswith(NOT_WORTH_A_NOTE):
            return  # each of these modules has a note of its own; or nothing of interest
        elif text not in self.notes:
            self.notes.append(text)
            self._note(max(self._step - 1, 0), text)


class _Silent:
    """Stands in for tqdm where its bar would only fill the log."""

    def __init__(self, items: Iterable[Any], **_: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def set_postfix(self, *_: Any, **__: Any) -> None:
        """What the bar would show beside itself."""


def _relative(parts: list[_Squared], error: Callable[[_Squared], float | None]) -> float | None:
    """Summed squared errors over the summed squared outputs; None if one of them is not known."""
    errors = [error(part) for part in parts]
    total = sum(part.output for part in parts)
    if total <= 0 or any(value is None for value in errors):
        return None
    return sum(value for value in errors if value is not None) / total


def _output(weight: Tensor, hessian: Tensor) -> float:
    """||WX||^2 / n from H = 2 XX^T / n; weight (out, in), hessian (in, in)."""
    return float(((weight @ hessian) * weight).sum()) / 2


def _before_gptq(index: int, given: dict[str, Any]) -> _Squared:
    """The squared output of one Linear of a batch, and the squared error of rounding it to nearest on its grid."""
    from compressed_tensors.quantization import fake_quantize

    weight, hessian = given["weights"][index].float(), given["hessians"][index].float()
    zero, shared = given.get("zero_point"), given.get("global_scale")
    rounded = fake_quantize(
        weight,
        given["scale"][index],
        None if zero is None else zero[index],
        given["quant_args"],
        global_scale=None if shared is None else shared[index],
    )
    return _Squared(_output(weight, hessian), rtn=_output(weight - rounded.float(), hessian))
