"""YAML text as ruamel.yaml reads and writes it here: plain values only, within limits, in the file's own spelling."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, NodeEvent
from ruamel.yaml.representer import RoundTripRepresenter

from backend.errors import ConfigError

# A job file has some hundred values. The limits keep the worst file below a second of the reader's time.
MAX_BYTES = 250_000
MAX_LINES = 10_000
MAX_DEPTH = 20
MAX_NODES = 5_000
MAX_ALIASES = 50


@dataclass(frozen=True)
class Style:
    """How a file is spelt: `True` and nothing in the AWQ guide, `true` and `null` elsewhere; sections by 2 or 4.

    Attributes:
        lower: Whether booleans are written in lower case.
        null: Whether empty values are written as `null`.
        indent: Blanks by which a section's keys are set in.
    """

    lower: bool = False
    null: bool = False
    indent: int = 2

    @classmethod
    def of(cls, text: str) -> Style:
        """The spelling that a file has."""
        lower, upper = (len(re.findall(rf": +({words})\b", text)) for words in ("true|false", "True|False"))
        section = re.search(r"^[^\s#][^\n#]*:[ \t]*(?:#.*)?\n(?:[ \t]*(?:#.*)?\n)*( {1,8})[^\s#-]", text, re.MULTILINE)
        indent = len(section[1]) if section else 2
        return cls(lower > upper, re.search(r": +null\b", text) is not None, indent)


@cache
def _representer(style: Style) -> type[RoundTripRepresenter]:
    class Representer(RoundTripRepresenter):
        """Writes booleans and empty values the way a file does."""

    true, false = ("true", "false") if style.lower else ("True", "False")
    words = {True: true, False: false}
    Representer.add_representer(bool, lambda rep, v: rep.represent_scalar("tag:yaml.org,2002:bool", words[v]))
    null = "null" if style.null else ""
    Representer.add_representer(type(None), lambda rep, _: rep.represent_scalar("tag:yaml.org,2002:null", null))
    return Representer


def yaml_of(style: Style | None = None) -> YAML:
    """What reads a file, and writes it in this style."""
    yaml = YAML(typ="rt", pure=True)
    style = style or Style()
    yaml.Representer = _representer(style)
    yaml.map_indent = style.indent
    yaml.preserve_quotes = True
    yaml.width = 4096  # long FORMAT_STRINGs stay on their line
    return yaml


def written(tree: Any, style: Style) -> str:
    """A ruamel tree as text."""
    stream = io.StringIO()
    yaml_of(style).dump(tree, stream)
    return stream.getvalue()


def plain_of(node: Any, path: str = "", depth: int = 0, budget: list[int] | None = None) -> Any:
    """A ruamel tree as plain dicts, lists and scalars, with limits against hostile files.

    Aliases are expanded while being counted, so nested aliases cannot blow up memory.
    """
    budget = [MAX_NODES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise ConfigError(
            f"the file has more than {MAX_NODES} values or is nested deeper than {MAX_DEPTH} levels", key=path
        )
    tag = getattr(node, "tag", None)
    if tag is not None and tag.value is not None:
        raise ConfigError(f"found a value tagged {tag.value}; only plain YAML is read", key=path)
    if isinstance(node, Mapping):
        plain: dict[str, Any] = {}
        for key, value in node.items():
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise ConfigError("found a key that is no plain word; keys are text", key=path)
            name = str(key)
            if name in plain:
                raise ConfigError(f"found the key {name} twice", key=path)
            plain[name] = plain_of(value, f"{path}.{name}".lstrip("."), depth + 1, budget)
        return plain
    if isinstance(node, list):
        return [plain_of(v, f"{path}[{i}]", depth + 1, budget) for i, v in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    if isinstance(node, int):
        return int(node)
    if isinstance(node, float):
        if not math.isfinite(node):
            raise ConfigError(f"found {node}; it must be a finite number", key=path, value=float(node))
        return float(node)
    if isinstance(node, str):
        return str(node)
    raise ConfigError(f"found a value of kind {type(node).__name__}; only plain YAML is read", key=path)


def check_shape(text: str) -> None:
    """Refuse a hostile file while it is only a stream of events, before a tree is made of it.

    Raises:
        ConfigError: If it has too many values, levels or aliases; with the line.
    """
    nodes = depth = aliases = 0
    for event in yaml_of().parse(io.StringIO(text)):
        if isinstance(event, CollectionEndEvent):
            depth -= 1
            continue
        nodes += isinstance(event, NodeEvent)
        aliases += isinstance(event, AliasEvent)
        depth += isinstance(event, CollectionStartEvent)
        for found, limit, what in (
            (nodes, MAX_NODES, "values"),
            (depth, MAX_DEPTH, "levels"),
            (aliases, MAX_ALIASES, "aliases"),
        ):
            if found > limit:
                line = event.start_mark.line + 1
                raise ConfigError(f"line {line}: the file has more than {limit} {what}, which no job file needs")
