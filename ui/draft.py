"""Between the form's controls and a job file, without losing anything of the file.

A draft is the text that was opened plus what the controls showed for it. Only controls that now show
something else are written into the text, so unknown keys, comments, quotes, and even values that no control
can show stay as they were.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

from pydantic import BaseModel

from backend.errors import ConfigError, ConfigErrors
from backend.schema import (
    ALGORITHMS,
    DEMO,
    SECTIONS,
    Document,
    FieldSpec,
    JobConfig,
    describe,
    parse_file,
    parse_yaml,
    sections,
)  # fmt: skip

_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d{1,3})?")

UNSET = ""
"""What a control shows for a choice that is left to its default; Gradio has no None among choices."""

TEMPLATE = f"""\
# Model configuration
MODEL: "{DEMO}"

# Data configuration
DATASET_NAME: "{DEMO}"
DATASET_SUBNAME: ""
TEXT_COLUMN: "text"
SPLIT: "train"
DATA_PATH:
FORMAT_STRING:

# Quantization configuration
llm:
  AutoAWQ:
    ZERO_POINT: true
    W_BIT: 4
    Q_GROUP_SIZE: 128
    VERSION: "GEMM"

# Job configuration
CUDA_ID: "0"
ALGORITHM: "AutoAWQ"
JOB_SERVICE: "Kompress"
USER_FOLDER: "user_data"
JOB_ID: "my-first-job"
TASK: "llm"
"""


@dataclass(frozen=True)
class FormField:
    """One control of the form: where its value stands in the file, and what the schema says about it."""

    path: tuple[str, ...]
    spec: FieldSpec

    @property
    def key(self) -> str:
        """Dotted path, as in error messages."""
        return ".".join(self.path)


def form_fields() -> tuple[FormField, ...]:
    """Every setting of the schema, in the order of the file: top level, algorithms, our own sections."""
    places: list[tuple[tuple[str, ...], type[BaseModel]]] = [((), JobConfig)]
    for name, algorithm in ALGORITHMS.items():
        places += sections(algorithm, ("llm", name))
    places += [((name,), model) for name, model in SECTIONS.items()]
    return tuple(FormField((*prefix, spec.key), spec) for prefix, model in places for spec in describe(model))


FIELDS = form_fields()


@dataclass(frozen=True, eq=False)  # each opened file is its own draft; Gradio hashes it to see that it changed
class Draft:
    """A job file in the form.

    Attributes:
        text: The file as it was opened.
        shown: What each control of `FIELDS` showed for it.
    """

    text: str
    shown: tuple[Any, ...]


def open_draft(text: str) -> Draft:
    """Read a file in YAML or JSON into the form; it may still have wrong values.

    Raises:
        ConfigError: If it is neither, too large, or not a mapping of keys.
    """
    document = parse_file(text)
    values, unfit = document.values, _unfit(document)
    shown = (_opened(field, _lookup(values, field), unfit=field.key in unfit) for field in FIELDS)
    return Draft(document.dump(), tuple(shown))


def _unfit(document: Document) -> set[str]:
    """Dotted keys of the settings that are wrong."""
    try:
        _ = document.config
    except ConfigErrors as error:
        return {one.key for one in error.errors}
    return set()


def _opened(field: FormField, value: Any, *, unfit: bool) -> Any:
    """What a control shows for a file's value; nothing if that would stand for another kind of value.

    `SPLIT: 2024` is no text and `SAMPLES: "8"` no number: typed into the form they are, so they have to be typed.
    """
    spec = field.spec
    shown = to_control(spec, value)
    typed = spec.type in ("str", "int", "float")
    return "" if unfit and typed and type(from_control(spec, shown)) is not type(value) else shown


def merge(draft: Draft, values: Sequence[Any]) -> Document:
    """The draft's file with what was changed in the form since it was opened.

    Args:
        draft: What was opened.
        values: The present values of the controls, in the order of `FIELDS`.
    """
    document = parse_yaml(draft.text)
    for field, shown, value in zip(FIELDS, draft.shown, values, strict=True):
        # A control that shows nothing where something must stand was never filled, e.g. for a value it cannot show.
        unfilled = value is None and field.spec.type in ("choice", "int_choice", "bool")
        # Gradio's checkbox makes False of nothing as soon as it is drawn, so only a tick counts as chosen there.
        unfilled = unfilled or (field.spec.type == "bool" and shown is None and value is False)
        if not unfilled and from_control(field.spec, value) != from_control(field.spec, shown):
            document.set(field.path, from_control(field.spec, value))
    return document


def _lookup(values: Any, field: FormField) -> Any:
    for key in field.path:
        if not isinstance(values, dict) or key not in values:
            return field.spec.default
        values = values[key]
    return field.spec.default if values is None or values == "" else values


def to_control(spec: FieldSpec, value: Any) -> Any:
    """A file's value as its control shows it; a value of a wrong kind that it cannot show, as empty.

    Numbers are shown as text: Gradio's field for numbers makes 0 of an empty one whenever it is drawn, and it could not
    show what somebody wrote instead of a number.
    """
    if spec.type == "bool":
        return value if isinstance(value, bool) else None
    if spec.several:
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        # All or nothing: whoever chooses among them writes what is shown into the file.
        return items if all(item in spec.choices and not isinstance(item, bool) for item in items) else []
    if spec.type in ("choice", "int_choice"):
        if value is None and spec.optional:
            return UNSET
        return value if value in spec.choices and not isinstance(value, bool) else None
    if spec.type in ("int", "float"):
        return "" if value is None or isinstance(value, (list, dict)) else str(value)
    if spec.type == "list" and spec.choices:
        fits = isinstance(value, list) and all(item in spec.choices for item in value)
        return list(value) if fits else []
    if spec.type == "list":
        return _list_text(value)
    if spec.type == "yaml":
        return ", ".join(_flow(item) for item in value) if isinstance(value, list) else str(value or "")
    return "" if value is None else str(value)


def from_control(spec: FieldSpec, value: Any) -> Any:
    """A control's value as it is written into the file: of several choices a single one stands there alone."""
    if spec.several:
        chosen = list(value or [])
        return chosen if len(chosen) > 1 else chosen[0] if chosen else None
    if spec.type in ("choice", "int_choice"):
        return None if value == UNSET else value
    if spec.type == "yaml":
        return _from_flow(str(value or "").strip())
    if spec.type in ("int", "float"):
        return _number(str("" if value is None else value).strip())
    if spec.type == "list":
        if spec.choices:
            return [choice for choice in spec.choices if choice in (value or [])]
        text = str(value or "").strip()
        return None if not text else [part.strip() for part in text.strip("[]").split(",") if part.strip()]
    if spec.type == "str":
        text = str(value or "")
        text = text if spec.key == "FORMAT_STRING" else text.strip()
        return text or None
    return value


def _number(text: str) -> int | float | str | None:
    """The number that a text stands for; the text itself if it is none, for the schema to refuse."""
    if not _NUMBER.fullmatch(text) or not isfinite(number := float(text)):
        return text or None
    if text.lstrip("+-").isdigit():
        return int(text)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number


def _flow(item: Any) -> str:
    """A plain value as YAML on one line, e.g. `{PATTERN: "*.down_proj", W_BIT: 8}`."""
    if isinstance(item, dict):
        return "{" + ", ".join(f"{key}: {_flow(value)}" for key, value in item.items()) + "}"
    if isinstance(item, list):
        return "[" + ", ".join(map(_flow, item)) + "]"
    return str(item) if isinstance(item, bool) else json.dumps(item, ensure_ascii=False)


def _from_flow(text: str) -> Any:
    """The list that a line of YAML stands for; the line itself if it is none, for the schema to refuse."""
    inner = text.removeprefix("[").removesuffix("]") if text.startswith("[") else text
    try:
        return parse_yaml(f"x: [{inner}]").values["x"]
    except ConfigError:
        return text


def _list_text(value: Any) -> str:
    """A list as one line, e.g. `arc_challenge:25, gsm8k:5:250`; `[]` for the empty list."""
    if value is None:
        return ""
    items = value if isinstance(value, list) else [value]
    return ", ".join(_task_text(item) for item in items) or "[]"


def _task_text(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    numbers = [item.get("NUM_FEWSHOT", 0), item.get("LIMIT")]
    return ":".join(str(part) for part in (item.get("NAME", ""), *numbers) if part is not None)
