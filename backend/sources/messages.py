"""Rows that hold a conversation: a list of messages, each with a role and its content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from backend.errors import DataError

Messages = list[dict[str, Any]]
CalibrationRow = str | Messages
TemplateMode = Literal["auto", "on", "off"]


def is_messages(value: Any) -> bool:
    """Whether a column's value is a conversation, as chat datasets store it."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m and "content" in m for m in value)
    )


def plain_text(messages: Messages) -> str:
    """Only what was said, one message per line."""
    return "\n".join("" if message["content"] is None else str(message["content"]) for message in messages)


def is_empty(row: CalibrationRow) -> bool:
    """Whether there is nothing to calibrate with in a row."""
    return not (row if isinstance(row, str) else plain_text(row)).strip()


def needs_template(row: CalibrationRow, mode: TemplateMode) -> bool:
    """Whether a row is written out by the chat template."""
    return mode == "on" or (mode == "auto" and not isinstance(row, str))


def has_chat_template(model_dir: Path) -> bool:
    """Whether a model folder brings a chat template. Reads small files, imports no tokenizer."""
    if (model_dir / "chat_template.jinja").is_file() or (model_dir / "chat_template.json").is_file():
        return True
    file = model_dir / "tokenizer_config.json"
    return file.is_file() and '"chat_template"' in file.read_text(encoding="utf-8", errors="replace")


def no_template_error(label: str) -> DataError:
    """What to say where a template is needed and the model has none."""
    return DataError(
        f"TEXT_COLUMN: {label} needs a chat template and the model's tokenizer has none; set "
        "CALIBRATION.CHAT_TEMPLATE to off to read only the text, or give a model with a chat template"
    )


def written_out(tokenizer: Any, row: CalibrationRow) -> str:
    """A row as the chat template of a transformers tokenizer writes it; plain text is one message of the user.

    Raises:
        DataError: If the template refuses the conversation.
    """
    messages = [{"role": "user", "content": row}] if isinstance(row, str) else row
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program, in a sandbox: it may raise anything
        raise DataError(
            f"TEXT_COLUMN: the model's chat template refuses a row with the roles "
            f"{', '.join(str(m['role']) for m in messages[:6])}: {error}; choose other rows, or set "
            "CALIBRATION.CHAT_TEMPLATE to off"
        ) from None


def row_encoder(tokenizer: Any, mode: TemplateMode) -> Callable[[Sequence[CalibrationRow]], list[list[int]]]:
    """From rows to token ids with a transformers tokenizer.

    Plain text gets the tokenizer's own special tokens. What the chat template writes has them already, so none are
    added a second time.

    Raises:
        DataError: While encoding, if the model has no template or it refuses a conversation.
    """

    def encode(rows: Sequence[CalibrationRow]) -> list[list[int]]:
        templated = [needs_template(row, mode) for row in rows]
        if any(templated) and not getattr(tokenizer, "chat_template", None):
            raise no_template_error("a row of messages" if mode == "auto" else "CALIBRATION.CHAT_TEMPLATE: on")
        ids: list[list[int]] = [[] for _ in rows]
        for use_template in (False, True):
            places = [place for place, flag in enumerate(templated) if flag is use_template]
            if not places:
                continue
            if use_template:
                texts = [written_out(tokenizer, rows[place]) for place in places]
            else:
                texts = [row if isinstance(row, str) else plain_text(row) for row in (rows[p] for p in places)]
            for place, found in zip(
                places, tokenizer(texts, add_special_tokens=not use_template)["input_ids"], strict=True
            ):
                ids[place] = found
        return ids

    return encode
