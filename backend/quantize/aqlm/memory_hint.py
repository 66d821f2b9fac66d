"""Says which numbers to change where memory does not suffice."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from backend.errors import EngineError
from backend.quantize.aqlm.finetune_settings import FinetuneSettings

SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory", "bad_alloc")


@dataclass
class MemoryHint:
    """What was running when memory ran out.

    Attributes:
        device: Where.
        sequences: That pass a layer together.
        length: Tokens of each.
        finetune: Settings of block finetuning, or None.
        doing: What is going on, e.g. `finding codes of model.layers.3`.
        finetuning: Whether that is block finetuning.
    """

    device: torch.device
    sequences: int
    length: int
    finetune: FinetuneSettings | None
    doing: str = "embedding the text"
    finetuning: bool = False

    def advice(self) -> str:
        """What to change, with the numbers."""
        tips: list[str] = []
        if self.sequences > 1:
            also = " (the result stays the same but for rounding)" if self.finetune else ""
            tips.append(f"local_batch_size {self.sequences // 2} instead of {self.sequences}{also}")
        if self.finetuning and self.finetune and not self.finetune.use_checkpointing:
            tips.append("use_checkpointing: true, which keeps no weights for the backward pass")
        tips.append(f"shorter sequences than {self.length} tokens")
        return "; or ".join(tips)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn running out of memory into an error that says what to change.

        Raises:
            EngineError: With the original words, by which a job knows the outcome.
        """
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            first = (str(error).splitlines() or [""])[0] or "not enough memory: you tried to allocate too much"
            if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
                raise
            raise EngineError(
                f"Memory of {self.device} ran out while {self.doing}, with {self.sequences} x {self.length} tokens at "
                f"a time. Set {self.advice()}. ({type(error).__name__}: {first})"
            ) from error
