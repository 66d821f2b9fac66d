"""How the codebooks of a decoder layer are trained on the layer's own output. Imports no torch: pages read this too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from backend.errors import ConfigError

LOCAL_TOKENS = 4096
"""Tokens of a local batch where `local_batch_size` leaves its size open."""


@dataclass(frozen=True)
class FinetuneSettings:
    """Block finetuning of AQLM; the guide's `finetune_*` keys without their prefix.

    Attributes:
        max_epochs: Passes over the training sequences; 0: none.
        lr: Adam's step, constant.
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean squared gradient.
        batch_size: Sequences per step.
        local_batch_size: Sequences that pass the layer together; divides `batch_size`, changes memory and not the
            result, but for rounding and which sequences share a batch. None: as many as make about 4096 tokens.
        early_stop: Epochs in a row without a better validation loss after which it ends.
        use_checkpointing: Compute weights from codebooks again in the backward pass instead of keeping them: saves
            4 bytes per weight of the layer.

    Raises:
        ConfigError: If a value is out of range; the key is the guide's.
    """

    max_epochs: int = 5
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    batch_size: int = 8
    local_batch_size: int | None = None
    early_stop: int = 3
    use_checkpointing: bool = False

    def __post_init__(self) -> None:
        _whole("finetune_max_epochs", self.max_epochs, 0)
        _whole("finetune_batch_size", self.batch_size, 1)
        _whole("finetune_early_stop", self.early_stop, 1)
        _number("finetune_lr", self.lr, lambda lr: 0 < lr < math.inf, "numbers above 0")
        _number("finetune_adam_beta1", self.beta1, lambda beta: 0 <= beta < 1, "numbers from 0 and below 1")
        _number("finetune_adam_beta2", self.beta2, lambda beta: 0 <= beta < 1, "numbers from 0 and below 1")
        if self.local_batch_size is not None:
            _whole("local_batch_size", self.local_batch_size, 1)
            if self.batch_size % self.local_batch_size:
                raise ConfigError(
                    f"found {self.batch_size}, which local_batch_size {self.local_batch_size} does not divide; give a "
                    "multiple of it",
                    key="finetune_batch_size",
                    value=self.batch_size,
                )

    def local_batch(self, length: int) -> int:
        """Sequences of `length` tokens that pass the layer together: a divisor of `batch_size`."""
        if self.local_batch_size is not None:
            return self.local_batch_size
        most = max(1, LOCAL_TOKENS // length)
        return max(n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0 and n <= most)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FinetuneSettings:
        """The inverse of `to_dict`."""
        return cls(**values)


def _whole(key: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"found {value!r}; allowed are whole numbers from {low}", key=key, value=value)


def _number(key: str, value: object, allowed: Callable[[float], bool], told: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not allowed(value):
        raise ConfigError(f"found {value!r}; allowed are {told}", key=key, value=value)
