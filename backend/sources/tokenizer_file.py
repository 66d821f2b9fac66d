"""A model's tokenizer as its own tokenizer.json describes it, without transformers and torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_of(model_dir: Path) -> Tokenizer | None:
    """The tokenizer of a model folder; None if it has no tokenizer.json.

    Raises:
        ModelError: If the file is broken.
    """
    file = model_dir / "tokenizer.json"
    if not file.is_file():
        return None
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises plain Exception for a broken file
        raise ModelError(f"MODEL: {file} is broken: {str(error)[:300]}; get the file again") from None
