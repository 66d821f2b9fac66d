"""Rules about text columns and format strings, wherever a job file names a dataset."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence

from backend.schema.errors import ProblemAt

DEMO = "quantdeck/demo"
"""Name of the built-in model, and of the built-in text."""
GSM8K_PRESET = "gsm8k_restructured"
"""Name of a dataset that brings its own columns and format string."""


def column_names(columns: str) -> list[str]:
    """The names of a comma-separated list of columns, trimmed."""
    return [part.strip() for part in columns.split(",")]


def check_columns(columns: str) -> str:
    """The list, if every name in it is one.

    Raises:
        ValueError: If a name is empty.
    """
    if not all(column_names(columns)):
        raise ValueError("write one column name, or several separated by commas")
    return columns


def check_format(template: str | None, columns: Sequence[str]) -> None:
    """Refuse several columns without a format string, and one that names none, or what is no column.

    Raises:
        ProblemAt: At FORMAT_STRING.
    """
    if len(columns) > 1 and not template:
        example = " ".join("{" + column + "}" for column in columns)
        raise ProblemAt("FORMAT_STRING", f'several text columns need a format string, e.g. "{example}"', template)
    names = format_fields(template or "")
    if template and not names:
        example = "{" + columns[0] + "}"
        raise ProblemAt(
            "FORMAT_STRING", f"it names no column, so every row would be the same; write {example}", template
        )
    for name in names:
        if name not in columns:
            raise ProblemAt("FORMAT_STRING", f"{{{name}}} is not among TEXT_COLUMN ({', '.join(columns)})", template)


def format_fields(template: str) -> list[str]:
    """Names of the `{placeholders}` of a format string.

    Attribute and index access (`{a.b}`, `{a[0]}`) and unnamed fields are refused: text columns are plain values.

    Raises:
        ProblemAt: If the template is not a plain format string.
    """
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ProblemAt("FORMAT_STRING", f"{error}; write literal braces as {{{{ and }}}}", template) from None
    for name in names:
        if not re.fullmatch(r"\w[\w \-]*", name):
            raise ProblemAt("FORMAT_STRING", f"placeholder {{{name}}} is not a plain column name", template)
    return names
