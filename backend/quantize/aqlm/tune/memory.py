"""Says which numbers to change where memory does not suffice for tuning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from backend.errors import EngineError
from backend.quantize.aqlm.memory_hint import SIGNS
from backend.quantize.aqlm.tune.settings import TuneSettings


@contextmanager
def explained(settings: TuneSettings, processes: int, length: int, device: torch.device) -> Iterator[None]:
    """Turn running out of memory into an error that says what to change.

    Args:
        settings: Of the tuning that runs inside.
        processes: That share it.
        length: Tokens of a training sequence.
        device: Whose memory it is.

    Raises:
        EngineError: With the original words, by which a job knows the outcome.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        first = (str(error).splitlines() or [""])[0] or "not enough memory: you tried to allocate too much"
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        tips = advice(settings, processes, length)
        raise EngineError(
            f"Memory of {device} ran out while tuning with {settings.microbatch(processes, length)} x {length} tokens "
            f"at a time in {processes} {'process' if processes == 1 else 'processes'}. Set {'; or '.join(tips)}. "
            f"({type(error).__name__}: {first})"
        ) from error


def advice(settings: TuneSettings, processes: int, length: int) -> list[str]:
    """What takes less memory, cheapest first."""
    tips: list[str] = []
    microbatch = settings.microbatch(processes, length)
    smaller = [n for n in range(1, microbatch) if settings.batch_size // processes % n == 0 and n <= microbatch // 2]
    if smaller:
        tips.append(
            f"microbatch_size {max(smaller)} instead of {microbatch} (the result stays the same but for rounding)"
        )
    if not settings.gradient_checkpointing:
        tips.append("gradient_checkpointing: true (likewise)")
    tips.append(f"model_seqlen {length // 2} instead of {length}")
    if settings.update_codes:
        if not settings.code_adam_16bit:
            tips.append("code_adam_16bit: true")
        if settings.straight_through_buffer_dtype in (None, "float32"):
            tips.append("straight_through_buffer_dtype: bfloat16")
        tips.append("update_codes: false, which needs no buffer")
    return tips
