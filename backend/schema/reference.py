"""The reference of the job file, written from the schema: every section and setting, as Markdown, data or help.

`docs/yaml.md` is `markdown()`; a test keeps it current.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pydantic import BaseModel

from backend.errors import ConfigError
from backend.schema.facts import OWN, told
from backend.schema.fields import FieldSpec, Group, describe, listed, sections
from backend.schema.job import JobConfig

COMMAND = "python -m backend schema --markdown > docs/yaml.md"
"""What writes the file anew."""

TYPES = {
    "str": "text", "int": "whole number", "float": "number", "bool": "true or false", "choice": "one of",
    "int_choice": "one of", "list": "list", "yaml": "structure",
}  # fmt: skip
NO_LIMIT = 2**31  # bounds from here on only keep numbers finite
NEAR = 5

_TOP = f"""\
# The job file

Every section and key that a job file may have. This page is written from the schema that also makes the form, the
checks and `python -m backend schema KEY`: change the schema, then run

```
{COMMAND}
```

Keys that Quantdeck does not know stay in the file and are told. An empty value means the default. Marks: **required**
keys have no default; *advanced* keys are folded away in the form; *kept, not read* keys belong to other programs: they
stay in the file, and change nothing here. Where a key comes from stands in brackets; without them it is Quantdeck's
own. A key that matters only beside others says when: elsewhere the form hides it, and the file keeps it.
"""


@dataclass(frozen=True)
class Setting:
    """One setting with its place in the file.

    Attributes:
        path: The keys that lead to it, itself last.
        spec: What the schema says of it.
    """

    path: tuple[str, ...]
    spec: FieldSpec

    @property
    def key(self) -> str:
        """The path with dots, e.g. `llm.AutoAWQ.W_BIT`."""
        return ".".join(self.path)


def settings() -> list[Setting]:
    """All settings of the job file, section by section."""
    return [Setting((*path, spec.key), spec) for path, model in sections(JobConfig) for spec in describe(model)]


def as_data() -> list[dict[str, Any]]:
    """All settings as plain values, each with its dotted `path`."""
    return [{"path": setting.key, **asdict(setting.spec)} for setting in settings()]


def find(key: str) -> list[Setting]:
    """The settings of a dotted key, or of its last words, e.g. `AutoAWQ.W_BIT` or `W_BIT`; case does not matter.

    Raises:
        ConfigError: If there is none; the message names those that are spelt nearly so.
    """
    asked = tuple(key.casefold().split("."))
    known = settings()
    found = [s for s in known if tuple(part.casefold() for part in s.path)[-len(asked) :] == asked]
    if found:
        return found
    spellings: dict[str, list[str]] = {}
    for setting in known:
        for name in (setting.key, setting.path[-1]):
            spellings.setdefault(name.casefold(), []).append(setting.key)
    near = difflib.get_close_matches(key.casefold(), spellings, n=NEAR, cutoff=0.6)
    names = list(dict.fromkeys(name for match in near for name in spellings[match]))[:NEAR]
    hint = f"nearly so: {', '.join(names)}" if names else "`python -m backend schema` lists all"
    raise ConfigError(f"no key of a job file is called {key!r}; {hint}", value=key)


def help_of(setting: Setting) -> str:
    """The help of one setting for the terminal."""
    spec = setting.spec
    rows = [
        ("value", _allowed(spec)), ("default", _default(spec)), ("source", spec.source),
        ("matters if", told(spec.visible_when).replace("`", "")), ("", ", ".join(_marks(spec))),
    ]  # fmt: skip
    shown = "".join(f"  {name + ': ' if name else ''}{value}\n" for name, value in rows if value)
    return f"{setting.key}: {spec.label}\n{shown}  {spec.help}\n"


def listing() -> str:
    """One line per setting: its key, and what it is called in the form."""
    rows = settings()
    width = max(len(setting.key) for setting in rows)
    return "".join(f"{setting.key:<{width}}  {setting.spec.label}\n" for setting in rows)


def markdown() -> str:
    """The whole reference, the content of `docs/yaml.md`."""
    parts = [_TOP]
    for path, model in sections(JobConfig):
        rows = describe(model)
        if not rows:
            continue
        heading = f"`{'.'.join(path)}`" if path else "Top level"
        parts.append(f"## {heading}\n\n{_about(model)}\n")
        for group, members in _grouped(model, rows):
            if group.heading:
                parts.append(f"### {group.heading}\n")
            if group.lead:
                parts.append(f"{_cell(group.lead)}\n")
            parts.append(_table(members))
    return "\n".join(parts)


def _about(model: type[BaseModel]) -> str:
    """The first paragraph of the model's description."""
    return _cell(inspect.cleandoc(model.__doc__ or "").split("\n\n")[0])


def _grouped(model: type[BaseModel], rows: list[FieldSpec]) -> Iterator[tuple[Group, list[FieldSpec]]]:
    """The settings as the form groups them: by the groups of their algorithm, else by the sections they name."""
    names = list(dict.fromkeys(spec.section for spec in rows))
    known = {(group.section, group.ignored): group for group in _all_groups()}
    for name in names:
        for ignored in (False, True):
            members = [spec for spec in rows if spec.section == name and spec.ignored is ignored]
            alone = Group(name, "" if len(names) == 1 else name)
            if members:
                yield known.get((name, ignored), alone if not ignored else Group(name, "Kept, not read")), members


def _all_groups() -> Iterator[Group]:
    for _, model in sections(JobConfig):
        yield from getattr(model, "GROUPS", ())


def _table(rows: list[FieldSpec]) -> str:
    lines = ["| key | value | default | what it does |", "|---|---|---|---|"]
    for spec in rows:
        marks = "".join(f" *{mark}.*" if mark != "required" else " **required.**" for mark in _marks(spec))
        what = f"{_cell(spec.label)}. {_cell(spec.help)}{_facts(spec)}{marks}"
        lines.append(f"| `{spec.key}` | {_cell(_allowed(spec))} | {_code(_default(spec))} | {what} |")
    return "\n".join(lines) + "\n"


def _facts(spec: FieldSpec) -> str:
    """When a setting matters, and where it comes from."""
    matters = f" Matters if {told(spec.visible_when)}." if spec.visible_when else ""
    return matters + ("" if spec.source == OWN else f" [{_cell(spec.source)}]")


def _allowed(spec: FieldSpec) -> str:
    """Type, choices, bounds and unit in a few words."""
    if spec.choices:
        words = listed(spec.choices)
        words += ", or a list of several" if spec.several else ""
        said = f"list of {words}" if spec.type == "list" else words
    else:
        said = TYPES[spec.type]
    if spec.ge is not None and spec.le is not None and spec.le < NO_LIMIT:
        said += f", {spec.ge:g} to {_number(spec.le)}"
    elif spec.ge is not None:
        said += f", at least {spec.ge:g}"
    elif spec.le is not None and spec.le < NO_LIMIT:
        said += f", at most {_number(spec.le)}"
    return said + (f" ({spec.unit})" if spec.unit and spec.unit not in said else "")


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _default(spec: FieldSpec) -> str:
    if spec.required:
        return ""
    if spec.default is None:
        return "empty"
    return _yaml(spec.default)


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_yaml(item) for item in value)}]"
    if isinstance(value, BaseModel):
        return _yaml(value.model_dump())
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    return '""' if value == "" else str(value)


def _marks(spec: FieldSpec) -> list[str]:
    found = ["required"] if spec.required else []
    found += ["kept, not read"] if spec.ignored else []
    return found + (["advanced"] if spec.advanced and not spec.ignored else [])


def _code(text: str) -> str:
    if text in ("", "empty"):
        return text
    return f"`{text.replace('|', chr(92) + '|')}`"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is, in one line."""
    shown = " ".join(text.split())
    for mark in "\\|<>*":
        shown = shown.replace(mark, {"<": "&lt;", ">": "&gt;"}.get(mark, f"\\{mark}"))
    return shown.replace("_", "\\_")
