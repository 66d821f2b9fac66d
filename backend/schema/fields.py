"""How one setting is declared, and how forms, help and docs read it back.

`setting()` is pydantic's `Field` with the extra facts that a form needs (label, unit, section, source, ...).
`OneOrMore` is the type of a setting that takes one value or a list of several, one configuration for each.
`describe()` turns a model class into plain `FieldSpec` rows, so no page has to know pydantic; `sections()` finds the
sections inside a section. `Group` is how an algorithm with many settings lays them out.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, GetCoreSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticUndefined, core_schema

from backend.schema.facts import Conditions, When, conditions

FieldType = Literal["str", "int", "float", "bool", "choice", "int_choice", "list", "yaml"]

T = TypeVar("T")


class _Several:
    """Marks a setting as `OneOrMore`, and checks its values against the `Literal` inside."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        allowed = typing.get_args(typing.get_args(source)[0])
        words = listed(allowed)

        def check(value: Any) -> Any:
            if not isinstance(value, (list, tuple)):
                if not _is_one_of(value, allowed):
                    raise ValueError(f"allowed: {words}, or a list of several of them")
                return value
            if not value:
                raise ValueError(f"name at least one of {words}")
            for item in value:
                if not _is_one_of(item, allowed):
                    raise ValueError(f"{item!r} is not among the allowed values {words}")
            if len(set(value)) < len(value):
                raise ValueError("each value may stand there once")
            return tuple(value)

        return core_schema.no_info_plain_validator_function(check)


OneOrMore = Annotated[T | tuple[T, ...], _Several()]
"""One value of a `Literal`, or a tuple of different ones; in the file `4` or `[4, 3]`."""


def each(value: T | tuple[T, ...]) -> tuple[T, ...]:
    """The values of a `OneOrMore` setting, in the order of the file."""
    return value if isinstance(value, tuple) else (value,)


def listed(values: Sequence[Any]) -> str:
    """Allowed values as a sentence has them, e.g. `128, 64 or 32`."""
    *most, last = (repr(value) for value in values)
    return f"{', '.join(most)} or {last}" if most else last


def _is_one_of(value: Any, allowed: Sequence[Any]) -> bool:
    return any(value == choice and type(value) is type(choice) for choice in allowed)


def drop_empty(values: Any) -> Any:
    """A section without the keys that stand there with no value: an empty value means the default."""
    if not isinstance(values, dict):
        return values
    return {k: v for k, v in values.items() if v is not None and not (isinstance(v, str) and not v.strip())}


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
        several: True if a list of several choices is taken too.
        optional: True if it may be left empty, which is not the same as any of the choices.
        empty: A few words on what an empty value means, where it may be left empty.
        source: Where it comes from: a guide, a program, or Quantdeck.
        visible_when: When it matters; without conditions always.
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
    several: bool
    optional: bool
    empty: str
    source: str
    visible_when: Conditions


@dataclass(frozen=True)
class Group:
    """Some settings of an algorithm that a form shows together.

    Attributes:
        section: The settings' section.
        heading: For people; empty: they stand at the top, without one.
        lead: One or two sentences below the heading.
        ignored: True for the settings that nothing reads.
    """

    section: str
    heading: str = ""
    lead: str = ""
    ignored: bool = False


def setting(
    default: Any = ...,
    *,
    label: str,
    help: str,
    section: str,
    source: str,
    visible_when: When | Sequence[When | tuple[When, ...]] = (),
    unit: str = "",
    choices: Sequence[Any] = (),
    ge: float | None = None,
    le: float | None = None,
    advanced: bool = False,
    ignored: bool = False,
    as_yaml: bool = False,
    empty: str = "all",
    default_factory: Any = None,
) -> Any:
    """Declare one setting.

    Bounds are checked by pydantic; `choices` document what the annotation (a `Literal`) enforces. `as_yaml` marks
    a structure that a form shows as the line of YAML it is. `empty` is what a number that may be left empty means then.
    `source` and `visible_when` are explained in `backend.schema.facts`.
    """
    extra: dict[str, Any] = {
        "label": label,
        "section": section,
        "unit": unit,
        "choices": list(choices),
        "advanced": advanced,
        "ignored": ignored,
        "as_yaml": as_yaml,
        "empty": empty,
        "source": source,
        "visible_when": conditions(visible_when),
    }
    bounds: dict[str, Any] = {"ge": ge, "le": le}
    if default_factory is not None:
        return Field(default_factory=default_factory, description=help, json_schema_extra=extra, **bounds)
    return Field(default, description=help, json_schema_extra=extra, **bounds)


def _bare(annotation: Any) -> Any:
    """The annotation without `| None` and without marks: `StrictInt` is an `int`, `OneOrMore[X]` an `X`."""
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


def sections(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """A schema model and all sections inside it, each with its path, in the order of the file."""
    yield path, model
    for key, field in model.model_fields.items():
        if (inner := _section(field)) is not None:
            yield from sections(inner, (*path, key))


def _section(field: FieldInfo) -> type[BaseModel] | None:
    """The model of a field that is a section of its own."""
    bare = _bare(field.annotation)
    return bare if isinstance(bare, type) and issubclass(bare, BaseModel) else None


def describe(model: type[BaseModel]) -> list[FieldSpec]:
    """The settings of a schema model in the order of its declaration, without those of sections inside it."""
    rows = []
    for key, field in model.model_fields.items():
        if _section(field) is not None:
            continue
        bare = _bare(field.annotation)
        extra = typing.cast("dict[str, Any]", field.json_schema_extra)
        choices = tuple(extra["choices"])
        if not choices and typing.get_origin(bare) is Literal:
            choices = typing.get_args(bare)
        default = field.get_default(call_default_factory=True, validated_data={})
        rows.append(
            FieldSpec(
                key=key,
                label=extra["label"],
                type="yaml" if extra["as_yaml"] else _field_type(field.annotation),
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
                several=any(isinstance(mark, _Several) for mark in field.metadata),
                optional=type(None) in typing.get_args(field.annotation),
                empty=extra["empty"],
                source=extra["source"],
                visible_when=extra["visible_when"],
            )
        )
    return rows
