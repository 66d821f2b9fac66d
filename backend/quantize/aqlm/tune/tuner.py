"""One process's part in tuning: steps, measurements, saved states. Source: Malinovskii et al. 2024 (arXiv 2405.14852).

A step: dL/dW for every weight by the straight-through rule; codebooks, scales and what is not quantized move along
their gradients (P); each weight's buffer moves along dL/dW, and the groups that are farthest from it get the codes
that are nearest to it (V).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backend.errors import ModelError
from backend.quantize.aqlm.tune.batches import Batches, microbatches
from backend.quantize.aqlm.tune.divergence import divergence
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.lamb import Lamb
from backend.quantize.aqlm.tune.progress import History, Progress
from backend.quantize.aqlm.tune.report import Measurement, StepReport
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.aqlm.tune.student import Student
from backend.quantize.aqlm.tune.teacher import Teacher


@dataclass(frozen=True)
class Text:
    """Sequences, and what the base model predicts for them.

    Attributes:
        tokens: (samples, L), int64.
        teacher: The base model.
    """

    tokens: Tensor
    teacher: Teacher


class Tuner:
    """Tunes a student on text, as one of the processes of a group.

    Args:
        student: The model.
        train: What it learns on.
        validation: What decides which step's model is kept.
        settings: How.
        group: The processes.
        device: Where to compute.
        progress: Where states and the best model are kept.
        save_states: Whether states are to be saved, so that a later process can go on.
        tell: Called after each step, and with step 0 after the first measurement.
    """

    def __init__(
        self,
        student: Student,
        train: Text,
        validation: Text,
        settings: TuneSettings,
        group: Group,
        device: torch.device,
        progress: Progress,
        *,
        save_states: bool,
        tell: Callable[[StepReport], None],
    ) -> None:
        self._student, self._train, self._validation = student, train, validation
        self._settings, self._group, self._device = settings, group, device
        self._progress, self._save_states, self._tell = progress, save_states, tell
        self._batches = Batches(len(train.tokens), settings.batch_size, settings.seed)
        self._steps = settings.steps(len(train.tokens))
        self._size = settings.microbatch(group.size, train.tokens.shape[1])
        self._groups = sum(linear.total_groups for linear in student.linears.values())
        self._first_v = settings.p_only_epochs * len(train.tokens) // settings.batch_size  # step of the first V part
        self._codebooks, self._rest = self._continuous_optimizers()
        self._codes: Lamb | None = None
        self.history = History()

    def run(self, notes: list[str]) -> History:
        """From wherever an earlier process came to the end. All gradients are of means over tokens.

        Args:
            notes: What is to stand in the history from its beginning.
        """
        kept = self._progress.load()
        if kept is None:
            self._progress.clear()
            self.history.notes = notes
            self._measure()
            if not self.history.measurements:
                raise ModelError("The base model or the quantized one predicts NaN for the validation text.")
            self._progress.keep_best(0, self._student.snapshot())
            self._report(math.nan, 0.0)
            self._save()
        else:
            self.history = kept
            self._restore(self._progress.state(kept.step))
        while not self.history.finished:
            self._step()
        return self.history

    def _step(self) -> None:
        history, settings = self.history, self._settings
        loss = self._backward(self._batches[history.step])
        if not math.isfinite(loss):
            self._stop(f"the loss was not finite in step {history.step + 1}")
            return
        number = history.step + 1
        factor = self._factor(history.step)
        with_codes = settings.update_codes and history.step >= self._first_v
        if with_codes and self._codes is None:
            self._begin_codes()
        grads = self._move_continuous(number, factor)
        changed = self._move_codes(grads, number, factor) if with_codes else 0
        for name in self._student.linears:
            self._student.dequantize(name)
        history.step = number
        history.losses.append(loss)
        history.changed.append(changed / self._groups)
        measure = number % settings.eval_every_steps == 0 or number == self._steps
        better = self._measure() if measure else False
        if better:
            history.best_step = number
            self._progress.keep_best(number, self._student.snapshot())
        self._report(loss, history.changed[-1])
        if measure and not math.isfinite(self._last):
            self._stop(f"the validation loss was not finite after step {number}")
        elif self._is_late():
            self._stop(f"{settings.early_stop} measurements in a row were no better")
        elif number == self._steps:
            self._stop(None)
        elif measure or number % settings.save_every_steps == 0:
            self._save()

    # -- the parts of a step

    def _backward(self, batch: list[int]) -> float:
        """Gradients of the mean divergence of a batch; returns it."""
        parts = microbatches(batch, self._size, self._group.rank, self._group.size)
        tokens = len(batch) * self._train.tokens.shape[1]
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        for number, rows in enumerate(parts, 1):
            self._student.sync_gradients(number == len(parts) or not self._settings.minimize_sync)
            logits = self._student.logits(self._train.tokens[rows])
            loss, grad = divergence(self._train.teacher.logits(rows), logits.detach(), gradient=True)
            total += loss
            if not bool(loss.isfinite()) and self._group.size == 1:
                break  # several processes have to meet again after the backward pass
            logits.backward(grad)
            del logits, grad
        self._tokens = tokens
        return float(self._group.sum(total)) / tokens

    def _move_continuous(self, number: int, factor: float) -> dict[str, Tensor]:
        """The P step. Returns the weights' gradients, where the V step needs them."""
        settings, student = self._settings, self._student
        of_codebooks: dict[str, Tensor] = {}
        of_rest: dict[str, Tensor] = {}
        weights: dict[str, Tensor] = {}
        for name, linear in student.linears.items():
            grad = student.gradient(name)
            if grad is None:
                continue
            grad /= self._tokens
            if settings.update_codebooks_and_scales:
                of_codebooks[f"{name}.codebooks"], of_codebooks[f"{name}.scales"] = linear.gradients(grad)
            if settings.update_codes and self._codes is not None:
                weights[name] = grad
        if settings.update_non_quantized_parameters:
            for name in student.others:
                grad = student.gradient(name)
                if grad is not None:
                    of_rest[name] = grad.div_(self._tokens)
        self._codebooks.step(of_codebooks, number, factor)
        self._rest.step(of_rest, number, factor)
        return weights

    def _move_codes(self, grads: dict[str, Tensor], number: int, factor: float) -> int:
        """The V step. Returns the groups whose codes have changed."""
        assert self._codes is not None
        settings, changed = self._settings, 0
        for name in list(grads):
            linear = self._student.linears[name]
            self._codes.step({name: grads.pop(name)}, number - self._first_v, factor)
            changed += linear.change_codes(settings, number)
            if settings.delta_decay:
                assert linear.buffer is not None
                linear.buffer.lerp_(linear.weight().to(linear.buffer.dtype), settings.delta_decay)
        return changed

    def _factor(self, step: int) -> float:
        """Of both learning rates in a step, counted from 0."""
        settings = self._settings
        rise = min(1.0, (step + 1) / (settings.warmup_steps + 1))
        if settings.lr_schedule == "constant":
            return rise
        return rise * 0.5 * (1 + math.cos(math.pi * step / self._steps))

    # -- optimizers

    def _continuous_optimizers(self) -> tuple[Lamb, Lamb]:
        """Of codebooks and scales, and of what is not quantized."""
        settings, student = self._settings, self._student
        options: dict[str, Any] = {
            "beta1": settings.adam_beta1, "beta2": settings.adam_beta2, "lamb": settings.lamb,
            "debias": settings.debias, "amsgrad": settings.amsgrad, "sum_over_processes": self._group.sum,
        }  # fmt: skip
        of_codebooks: dict[str, Tensor] = {}
        for name, linear in student.linears.items():
            of_codebooks |= {f"{name}.codebooks": linear.codebooks, f"{name}.scales": linear.scales}
        spread = {name for name in of_codebooks if name.endswith(".scales")}
        of_rest = student.others if settings.update_non_quantized_parameters else {}
        return (
            Lamb(
                of_codebooks if settings.update_codebooks_and_scales else {},
                lr=settings.lr if settings.codebook_lr is None else settings.codebook_lr, spread=spread, **options,
            ),
            Lamb(of_rest, lr=settings.lr, spread=of_rest.keys(), **options),
        )  # fmt: skip

    def _begin_codes(self) -> None:
        """Buffers, which start where the weights are, and their optimizer."""
        settings = self._settings
        dtype = getattr(torch, settings.straight_through_buffer_dtype or settings.master_dtype)
        buffers: dict[str, Tensor] = {}
        for name, linear in self._student.linears.items():
            linear.buffer = buffers[name] = linear.weight().to(dtype)
        self._codes = Lamb(
            buffers, lr=settings.code_lr, beta1=settings.code_beta1, beta2=settings.code_beta2, lamb=settings.lamb,
            debias=settings.debias, amsgrad=settings.amsgrad, spread=buffers.keys(),
            state_dtype=torch.bfloat16 if settings.code_adam_16bit else torch.float32,
            sum_over_processes=self._group.sum,
        )  # fmt: skip

    # -- measurements

    @torch.no_grad()
    def _measure(self) -> bool:
        """Measure on the validation sequences; whether the model is the best so far. A NaN is not recorded."""
        tokens = self._validation.tokens
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        mine = list(range(self._group.rank, len(tokens), self._group.size))
        turns = -(-len(tokens) // self._group.size)  # all processes run the model equally often
        size = max(1, self._size)
        for begin in range(0, turns, size):
            rows = mine[begin : begin + size]
            logits = self._student.logits(tokens[rows or [0]])
            if rows:
                total += divergence(self._validation.teacher.logits(rows), logits, gradient=False)[0]
        self._last = float(self._group.sum(total)) / tokens.numel()
        if not math.isfinite(self._last):
            return False
        better = all(self._last < measured.divergence for measured in self.history.measurements)
        self.history.measurements.append(Measurement(self.history.step, self._last))
        return better

    def _is_late(self) -> bool:
        patience, history = self._settings.early_stop, self.history
        since = [m for m in history.measurements if m.step > history.best_step]
        return patience is not None and len(since) >= patience

    # -- states

    def _stop(self, reason: str | None) -> None:
        self.history.stopped, self.history.finished = reason, True
        self._progress.save(self.history, None)

    def _save(self) -> None:
        if self._save_states:
            self._progress.save(self.history, self._state())

    def _state(self) -> dict[str, Tensor]:
        """All that the next step depends on, beside its number."""
        tensors = dict(self._student.others)
        for name, linear in self._student.linears.items():
            tensors |= {f"{name}.codes": linear.codes, f"{name}.codebooks": linear.codebooks}
            tensors[f"{name}.scales"] = linear.scales
            if linear.buffer is not None:
                tensors[f"{name}.buffer"] = linear.buffer
        for optimizer in (self._codebooks, self._rest, self._codes):
            if optimizer is not None:
                tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer.state.items()}
        return tensors

    def _restore(self, tensors: dict[str, Tensor]) -> None:
        if any(name.endswith(".buffer") for name in tensors):
            self._begin_codes()
        for name, linear in self._student.linears.items():
            linear.set_codes(tensors.pop(f"{name}.codes").to(self._device))
        for name, tensor in self._state().items():
            if name in tensors:
                tensor.copy_(tensors[name])
        for name in self._student.linears:
            self._student.dequantize(name)

    def _report(self, loss: float, changed: float) -> None:
        history = self.history
        measured = history.measurements[-1] if history.measurements else None
        self._tell(
            StepReport(
                step=history.step,
                total=self._steps,
                loss=loss,
                changed=changed,
                validation=measured.divergence if measured and measured.step == history.step else None,
                best=min((m.divergence for m in history.measurements), default=math.nan),
            )
        )
