"""Turns pydantic's errors into Quantdeck's: key, value found, what is allowed."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from backend.errors import ConfigError, ConfigErrors

# A rule across keys names the key that has to change: `FORMAT: ...`, `OVERRIDES.0.W_BIT: ...`.
_NAMED = re.compile(r"([A-Z][A-Z_]*(?:\.\d+)?(?:\.[A-Z_]+)?): (.*)", re.DOTALL)
MOST_SHOWN = 160  # characters of a line that a message quotes
_WANTED = {
    "string_type": "text (put it in quotes)",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "True or False",
    "list_type": "a list",
    "model_type": "a section with keys below it",
    "model_attributes_type": "a section with keys below it",
    "dict_type": "a section with keys below it",
}


class ProblemAt(ValueError):  # noqa: N818 - a message with its place; pydantic wants a ValueError
    """A rule across keys is broken; raised by the schema's validators.

    Args:
        key: The key that has to change, dotted, as it stands in the section that is validated.
        message: What was found, what is allowed, what to do.
        value: What was found.
    """

    def __init__(self, key: str, message: str, value: object = None) -> None:
        super().__init__(message)
        self.key = key
        self.value = value


class UnreadableFile(ConfigError):  # noqa: N818 - named for what it is about
    """A file that is not YAML, or not JSON.

    Args:
        kind: What it should be.
        problem: What is wrong with it.
        text: The file.
        line: Where, from 1; 0 if that is not known.
        column: Likewise.

    Attributes:
        line: Where, from 1; 0 if that is not known.
        column: Likewise.
        shown: That line of the file, or the part of a long one around the column.
        caret: The column within `shown`, from 1.
        problem: What is wrong, without the place.
    """

    def __init__(self, kind: str, problem: str, text: str, line: int = 0, column: int = 0) -> None:
        lines = text.splitlines()
        whole = lines[line - 1] if 0 < line <= len(lines) else ""
        start = max(0, column - MOST_SHOWN // 2) if len(whole) > MOST_SHOWN else 0
        self.shown = whole[start : start + MOST_SHOWN]
        self.caret = column - start
        where = f"line {line}, column {column}: " if line and column else f"line {line}: " if line else ""
        said = f"; the line is: {self.shown.strip()}" if self.shown.strip() else ""
        super().__init__(f"this is not valid {kind}: {where}{problem}{said}")
        self.line, self.column, self.problem = line, column, problem


def _sentence(error: Any) -> str:
    """One sentence for one pydantic error."""
    kind, context, found = error["type"], error.get("ctx", {}), error.get("input")
    if kind == "missing":
        return "this key is required and the file does not give it"
    if kind == "literal_error":
        return f"found {found!r}; allowed: {context['expected']}"
    if kind == "greater_than_equal":
        return f"found {found!r}; it must be at least {context['ge']}"
    if kind == "less_than_equal":
        return f"found {found!r}; it must be at most {context['le']}"
    if kind == "value_error":
        return f"found {found!r}; {context['error']}"
    if kind == "extra_forbidden":
        return "unknown key here"
    if kind in _WANTED:
        return f"found {found!r} ({type(found).__name__}); it must be {_WANTED[kind]}"
    return f"found {found!r}; {error['msg']}"


def config_errors(error: ValidationError) -> ConfigErrors:
    """All problems of a file at once, each with the dotted key it belongs to.

    Rules across keys carry their key, as it stands in their section: as `ProblemAt`, or at the front of their text
    (`DATA_PATH: ...`).
    """
    rows = []
    for item in error.errors():
        place = [str(part) for part in item["loc"]]
        rule = item["ctx"]["error"] if item["type"] == "value_error" else None
        if isinstance(rule, ProblemAt):
            rows.append(ConfigError(str(rule), key=".".join([*place, rule.key]), value=rule.value))
            continue
        named = _NAMED.fullmatch(str(rule)) if rule is not None else None
        message = named.group(2) if named else _sentence(item)
        key = ".".join([*place, named.group(1)] if named else place)
        rows.append(ConfigError(message, key=key, value=item.get("input")))
    return ConfigErrors(rows)
