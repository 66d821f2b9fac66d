"""How a model of additive weights is tuned against its base model. Imports no torch: pages read this too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from backend.errors import ConfigError

MICROBATCH_TOKENS = 4096
"""Tokens of a microbatch where `microbatch_size` leaves its size open."""
DTYPES = ("float32", "bfloat16", "float16")
SCHEDULES = ("constant", "cosine")
UPDATES = ("update_codes", "update_codebooks_and_scales", "update_non_quantized_parameters")


@dataclass(frozen=True)
class TuneSettings:
    """PV-tuning; the guide's `finetune_config` keys by their names, and some of ours.

    P stands for the continuous parameters (codebooks, scales, whatever is not quantized), V for the codes.
    Source: Malinovskii et al. 2024 (PV-Tuning, arXiv 2405.14852).

    Attributes:
        max_epochs: Passes over the training sequences.
        p_only_epochs: Of these, how many come first in which the codes stay. Ours.
        batch_size: Sequences per step, over all processes.
        microbatch_size: Sequences that a process computes at a time; divides batch_size / processes. None: as many as
            make about 4096 tokens.
        update_codes: Let codes change.
        update_codebooks_and_scales: Let codebooks and scales change.
        update_non_quantized_parameters: Let norms, embeddings, the head, biases and unquantized Linears change.
        lr: Step of the P part.
        codebook_lr: That of codebooks and scales, where it is to be another one; None: lr. Ours.
        adam_beta1: Decay of the mean gradient, P part.
        adam_beta2: Decay of the mean squared gradient, P part.
        code_lr: Step of the straight-through buffer of the weights, from which codes follow.
        code_beta1: Decay of the mean gradient, V part; 0 keeps no mean.
        code_beta2: Decay of the mean squared gradient, V part.
        lr_schedule: `constant`, or `cosine`: both steps fall to nothing along half a cosine. Ours.
        warmup_steps: Steps over which both rise from nothing. Ours.
        lamb: Scale each tensor's step by its norm (LAMB), so that both step sizes are relative; else Adam's own.
        debias: Correct Adam's means for their start at 0. None: with Adam yes, with LAMB no, where the norm of a step
            is set anyway.
        amsgrad: Divide by the largest mean squared gradient so far.
        max_code_change_per_step: Largest part of a Linear's groups that may get new codes in one step, in (0, 1].
        code_trust_ratio: Largest relative change of a Linear's weight by new codes in one step; None: any.
        force_code_update: The chosen groups have to change, to the second best codes if need be.
        delta_decay: How far the buffer is drawn back to the weight after each step: 0 not at all, 1 all the way.
        beam_size: Partial choices that the search for codes keeps; without effect for one codebook, where it is exact.
        straight_through_buffer_dtype: Type of the buffer; None: that of `master_dtype`.
        master_dtype: Type of the dequantized weights and their gradients. Codebooks, scales and the rest are float32.
        amp_dtype: Type of the forward and backward passes; None: bfloat16 where it is native, else float32.
        code_adam_16bit: Keep the means of the V part in bfloat16.
        gradient_checkpointing: Compute the inside of a decoder layer again in the backward pass.
        minimize_sync: With several processes, sum gradients once per step and not once per microbatch; takes memory.
        eval_every_steps: Steps between two measurements on the validation sequences.
        save_every_steps: Steps between two saved states; one is saved at each measurement, too.
        early_stop: Measurements in a row without a better one after which it ends; None: never.
        block_type: Class name of the decoder layers, refused if the model has none of it. None: whatever they are.
        seed: Of the order of the training sequences.

    Raises:
        ConfigError: If a value is out of range, or nothing would be updated.
    """

    max_epochs: int = 4
    p_only_epochs: int = 0
    batch_size: int = 16
    microbatch_size: int | None = None
    update_codes: bool = True
    update_codebooks_and_scales: bool = True
    update_non_quantized_parameters: bool = True
    lr: float = 3e-4
    codebook_lr: float | None = None
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    code_lr: float = 3e-3
    code_beta1: float = 0.0
    code_beta2: float = 0.95
    lr_schedule: str = "constant"
    warmup_steps: int = 0
    lamb: bool = True
    debias: bool | None = None
    amsgrad: bool = False
    max_code_change_per_step: float = 0.01
    code_trust_ratio: float | None = 0.01
    force_code_update: bool = False
    delta_decay: float = 0.0
    beam_size: int = 5
    straight_through_buffer_dtype: str | None = None
    master_dtype: str = "float32"
    amp_dtype: str | None = None
    code_adam_16bit: bool = False
    gradient_checkpointing: bool = False
    minimize_sync: bool = False
    eval_every_steps: int = 20
    save_every_steps: int = 20
    early_stop: int | None = None
    block_type: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for key in ("max_epochs", "batch_size", "beam_size", "eval_every_steps", "save_every_steps"):
            _whole(key, getattr(self, key), 1)
        for key in ("p_only_epochs", "warmup_steps", "seed"):
            _whole(key, getattr(self, key), 0)
        for key in ("microbatch_size", "early_stop"):
            if getattr(self, key) is not None:
                _whole(key, getattr(self, key), 1)
        for key in ("lr", "code_lr"):
            _number(key, getattr(self, key), 0.0, float("inf"), closed=False)
        for key in ("adam_beta1", "adam_beta2", "code_beta1", "code_beta2"):
            if getattr(self, key) != 0:
                _number(key, getattr(self, key), 0.0, 1.0, closed=False)
        _number("max_code_change_per_step", self.max_code_change_per_step, 0.0, 1.0, closed=True)
        for key in ("codebook_lr", "code_trust_ratio"):
            if getattr(self, key) is not None:
                _number(key, getattr(self, key), 0.0, float("inf"), closed=False)
        if self.delta_decay != 0:
            _number("delta_decay", self.delta_decay, 0.0, 1.0, closed=True)
        _one_of("lr_schedule", self.lr_schedule, SCHEDULES)
        _one_of("master_dtype", self.master_dtype, DTYPES)
        for key in ("straight_through_buffer_dtype", "amp_dtype"):
            if getattr(self, key) is not None:
                _one_of(key, getattr(self, key), DTYPES)
        if not any(getattr(self, key) for key in UPDATES):
            raise ConfigError(f"found False, as are {' and '.join(UPDATES[1:])}; set one of them", key=UPDATES[0])
        if self.microbatch_size is not None:
            self.microbatch(1, 1)  # a multiple for every number of processes is one for a single process

    def microbatch(self, processes: int, length: int) -> int:
        """Sequences of `length` tokens that each process computes at a time.

        Raises:
            ConfigError: If the batch cannot be shared out evenly, or the weights cannot be in their type.
        """
        if processes > 1 and self.master_dtype != "float32":
            raise ConfigError(
                f"found {self.master_dtype!r} with {processes} processes, which share weights in float32; set float32, "
                "or start one process",
                key="master_dtype",
                value=self.master_dtype,
            )
        share, rest = divmod(self.batch_size, processes)
        if rest:
            raise ConfigError(
                f"found {self.batch_size} for {processes} processes; give a multiple of {processes}",
                key="batch_size",
                value=self.batch_size,
            )
        if self.microbatch_size is None:
            most = max(1, MICROBATCH_TOKENS // length)
            return max(n for n in range(1, share + 1) if share % n == 0 and n <= most)
        if share % self.microbatch_size:
            together = f"{self.microbatch_size} x {processes} processes" if processes > 1 else f"{self.microbatch_size}"
            raise ConfigError(
                f"found {self.batch_size} with microbatch_size {together}; give a multiple of "
                f"{self.microbatch_size * processes}",
                key="batch_size",
                value=self.batch_size,
            )
        return self.microbatch_size

    def steps(self, sequences: int) -> int:
        """Steps in all: the sequences of all epochs in batches, a rest that fills no batch left out.

        Raises:
            ConfigError: If a batch is larger than the training text.
        """
        if self.batch_size > sequences:
            raise ConfigError(
                f"found {self.batch_size}, but there are {sequences} training sequences; give at most that many",
                key="batch_size",
                value=self.batch_size,
            )
        return self.max_epochs * sequences // self.batch_size

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TuneSettings:
        """The inverse of `to_dict`."""
        return cls(**values)


def _whole(key: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"found {value!r}; allowed are whole numbers from {low}", key=key, value=value)


def _number(key: str, value: object, low: float, high: float, *, closed: bool) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low < value < high and not (closed and value == high):  # type: ignore[operator]
        end = f" {'to' if closed else 'and below'} {high:g}" if high < float("inf") else ""
        raise ConfigError(f"found {value!r}; allowed are numbers above {low:g}{end}", key=key, value=value)


def _one_of(key: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"found {value!r}; allowed are {', '.join(allowed)}", key=key, value=value)
