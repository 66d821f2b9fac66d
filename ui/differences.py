"""Which lines of a job file say something else than the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import QuantdeckError
from backend.schema import Document, parse_yaml
from ui.draft import FIELDS, FormField, from_control, to_control


@dataclass(frozen=True)
class Difference:
    """A setting that differs.

    Attributes:
        line: Of its key, from 0.
        key: Dotted path.
        default: What would hold without it, in words.
    """

    line: int
    key: str
    default: str


def differences(text: str) -> list[Difference]:
    """The settings of a file that differ from their defaults, in the order of their lines.

    Settings without a default (the model, the job's name) do not count, nor keys that nothing reads.
    """
    try:
        document = parse_yaml(text)
    except QuantdeckError:
        return []
    values = document.values
    found = [one for field in FIELDS if (one := _difference(document, values, field)) is not None]
    return sorted(found, key=lambda one: one.line)


def _difference(document: Document, values: Mapping[str, Any], field: FormField) -> Difference | None:
    spec = field.spec
    value: Any = values
    for key in field.path:
        value = value.get(key) if isinstance(value, Mapping) else None
    if spec.required or spec.ignored or value is None or value == "" or _same(field, value):
        return None
    line = document.line_of(field.path)
    if line is None:
        return None
    default = spec.empty if spec.default is None or spec.default == "" else str(spec.default)
    return Difference(line, field.key, "empty" if spec.default is None and spec.type == "str" else default)


def _same(field: FormField, value: object) -> bool:
    """Whether a value means what the default means."""
    spec = field.spec
    if value == spec.default and isinstance(value, bool) == isinstance(spec.default, bool):
        return True
    shown, usual = to_control(spec, value), to_control(spec, spec.default)
    if shown in (None, [], "") and shown != usual:  # a value that no control can show
        return False
    return bool(from_control(spec, shown) == from_control(spec, usual)) and shown not in (None, [])
