"""How one setting is declared, and how forms, help and docs read it back.

`setting()` is pydantic's `Field` with the extra facts that a form needs (label, unit, section, advanced).
`describe()` turns a model class into plain `FieldSpec` rows, so no page has to know pydantic.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

FieldType = Literal["str", "int", "float", "bool", "choice", "int_choice", "list"]


@dataclass(frozen=True)
class FieldSpec:
    """One setting as a form or a document shows it.

    Attributes:
        key: Name in the YAML file.
        label: Name for people.
        type: Kind of control that fits.
        default: Value when the file does not give one; None where the file may leave it empty.
        choices: Allowed values, empty if free.
        unit: Unit of the number (`tokens`, `bits`, ...), or empty.
        ge: Smallest allowed number, or None.
        le: Largest allowed number, or None.
        help: One or two sentences on what it does.
        advanced: True if a newcomer need not see it.
        section: Part of the form it belongs to.
        ignored: True if the key is kept for the file's sake only and nothing reads it.
        required: True if there is no default.
    """

    key: str
    label: str
    type: FieldType
    default: Any
    choices: tuple[Any, ...]
    unit: str
    ge: float | None
    le: float | None
    help: str
    advanced: bool
    section: str
    ignored: bool
    required: bool


def setting(
    default: Any = ...,
    *,
    label: str,
    help: str,
    section: str,
    unit: str = "",
    choices: Sequence[Any] = (),
    ge: float | None = None,
    le: float | None = None,
    advanced: bool = False,
    ignored: bool = False,
    default_factory: Any = None,
) -> Any:
    """Declare one setting.

    Bounds are checked by pydantic; `choices` document what the annotation (a `Literal`) enforces.
    """
    extra: dict[str, Any] = {
        "label": label,
        "section": section,
        "unit": unit,
        "choices": list(choices),
        "advanced": advanced,
        "ignored": ignored,
    }
    bounds: dict[str, Any] = {"ge": ge, "le": le}
    if default_factory is not None:
        return Field(default_factory=default_factory, description=help, json_schema_extra=extra, **bounds)
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def _bare(annotation: Any) -> Any:
    """The annotation without `| None` and without pydantic's marks (`StrictInt` is an annotated `int`)."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _bare(next(a for a in typing.get_args(annotation) if a is not type(None)))
    if origin is typing.Annotated:
        return _bare(typing.get_args(annotation)[0])
    return annotation


def _field_type(annotation: Any) -> FieldType:
    bare = _bare(annotation)
    if typing.get_origin(bare) is Literal:
        return "int_choice" if all(isinstance(v, int) for v in typing.get_args(bare)) else "choice"
    if typing.get_origin(bare) in (list, tuple):
        return "list"
    by_type: dict[Any, FieldType] = {bool: "bool", int: "int", float: "float"}
    return by_type.get(bare, "str")


def _bound(field: FieldInfo, name: str) -> float | None:
    return next((getattr(m, name) for m in field.metadata if hasattr(m, name)), None)


def describe(model: type[BaseModel]) -> list[FieldSpec]:
    """The settings of a schema model in the order of its declaration.

    Nested models are not descended into: describe them by their own class.
    """
    rows = []
    for key, field in model.model_fields.items():
        bare = _bare(field.annotation)
        if isinstance(bare, type) and issubclass(bare, BaseModel):
            continue
        extra = typing.cast("dict[str, Any]", field.json_schema_extra)
        choices = tuple(extra["choices"])
        if not choices and typing.get_origin(bare) is Literal:
            choices = typing.get_args(bare)
        default = field.get_default(call_default_factory=True, validated_data={})
        rows.append(
            FieldSpec(
                key=key,
                label=extra["label"],
                type=_field_type(field.annotation),
                default=None if default is PydanticUndefined else default,
                choices=choices,
                unit=extra["unit"],
                ge=_bound(field, "ge"),
                le=_bound(field, "le"),
                help=field.description or "",
                advanced=extra["advanced"],
                section=extra["section"],
                ignored=extra["ignored"],
                required=field.is_required(),
            )
        )
    return rows
