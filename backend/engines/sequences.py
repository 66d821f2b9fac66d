"""The calibration text as packages take it: sequences one by one, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def read_sequences(path: Path) -> list[Tensor]:
    """Calibration sequences without their padding, each (length,) int64.

    Raises:
        DataError: If there is none.
    """
    from safetensors.torch import load_file

    stored = load_file(str(path))
    tokens = stored["tokens"]  # (samples, length)
    lengths = stored["lengths"].tolist() if "lengths" in stored else [tokens.shape[1]] * len(tokens)
    rows = [row[:length].clone() for row, length in zip(tokens, lengths, strict=True) if length]
    if not rows:
        raise DataError("the calibration text gives no sequence; give more text")
    return rows
