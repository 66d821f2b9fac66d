"""What is wrong with a setting, written at its control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from backend.schema import parse_yaml
from backend.schema.report import line
from ui.draft import FIELDS, Draft, FormField
from ui.fields import classes, help_text, plain_info
from ui.review import Problem


def messages_by_key(problems: Sequence[Problem], draft: Draft, values: Sequence[Any]) -> dict[str, str]:
    """What is wrong with each control, by the control's dotted key.

    A value that is still as it was opened is told with its line in that file.

    Args:
        problems: What the review found.
        draft: The file that was opened.
        values: What the controls show now, in the order of `FIELDS`.
    """
    texts: dict[str, str] = {}
    if not any(field is not None for field, *_ in problems):
        return texts
    opened = parse_yaml(draft.text)
    untouched = {
        field.key
        for field, then, now in zip(FIELDS, draft.shown, values, strict=True)
        if then == now or (then is None and now is False)  # an empty checkbox, drawn
    }
    for field, key, message in problems:
        if field is None:
            continue
        number = line(opened, key) if field.key in untouched else 0
        told = f"Line {number}: {message}" if number else message
        texts[field.key] = f"{texts[field.key]} {told}" if field.key in texts else told
    return texts


def mark(field: FormField, now: str | None, before: str | None) -> Any:
    """Puts a message in the place of a control's help, or the help back; nothing if it already stands there.

    Gradio's own validators are not used: any later event that reads a control takes their message away.
    """
    if now == before:
        return gr.skip()
    if now is None:
        return gr.update(info=help_text(field), elem_classes=classes(field))
    return gr.update(info=plain_info(now), elem_classes=[*classes(field), "qd-wrong"])
