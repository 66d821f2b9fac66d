"""Command lines of TensorRT-LLM's programs, made from the tables alone: what a table lacks cannot be written."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from pathlib import PurePath

from backend.errors import ConfigError
from backend.tensorrt_llm.flags import TABLES, Flag, Tool
from backend.tensorrt_llm.methods import LEGACY_VERSION

Value = str | int | float | bool | PurePath | None


def build_command(tool: str, values: Mapping[str, Value], *, version: str = LEGACY_VERSION) -> list[str]:
    """The argv of a program.

    Args:
        tool: One of `flags.TOOLS`.
        values: Option with its dashes -> value, in the order to write them; `MODEL` is the model of `trtllm-serve`. A
            `flag` is True or False; None leaves an option out. Paths are absolute.
        version: TensorRT-LLM's version.

    Returns:
        Program, its options, subcommand and its options; one argument per entry, never a shell string.

    Raises:
        ConfigError: At the option, with what was found and what is allowed.
    """
    if version not in TABLES:
        raise ConfigError(f"found TensorRT-LLM {version}; its options are known for {', '.join(TABLES)}", value=version)
    if tool not in TABLES[version]:
        raise ConfigError(f"found the program {tool!r}; there are {', '.join(TABLES[version])}", value=tool)
    about = TABLES[version][tool]
    given = {name: value for name, value in values.items() if value is not None}
    known = {**about.common, **about.flags}
    for name in given:
        if name not in known and name != about.positional:
            raise ConfigError(_unknown(name, tool, version, about), key=name, value=given[name])
    for name in (*about.required, *([about.positional] if about.positional else [])):
        if name not in given:
            raise ConfigError(f"{tool} {version} needs it, and it was not given", key=name)
    program, *command = about.words
    argv = [program, *_options(about.common, given), *command]
    if about.positional:
        argv.append(_text(Flag(about.positional, "path"), given[about.positional]))
    return argv + _options(about.flags, given)


def _options(table: Mapping[str, Flag], given: Mapping[str, Value]) -> list[str]:
    argv = []
    for name, value in given.items():
        if name not in table:
            continue
        flag = table[name]
        if flag.kind == "flag":
            if not isinstance(value, bool):
                raise _refused(flag, value, "it must be true or false")
            argv += [name] if value else []
        else:
            argv += [name, _text(flag, value)]
    return argv


def _text(flag: Flag, value: Value) -> str:
    """A value as an argument.

    Raises:
        ConfigError: If it is of another kind, not one of the choices, out of bounds, or could be read as an option.
    """
    if flag.kind in ("int", "float"):
        return _number(flag, value)
    text = str(value) if isinstance(value, PurePath) and flag.kind == "path" else value
    if not isinstance(text, str):
        raise _refused(flag, value, "it must be text" if flag.kind != "path" else "it must be a path")
    if flag.kind == "choice":
        if text not in flag.choices:
            raise _refused(flag, value, f"it must be one of {', '.join(flag.choices)}")
        return text
    if not text or text.startswith("-") or not text.isprintable():
        raise _refused(flag, value, "it must be printable text that does not begin with '-'")
    if flag.kind == "path" and (not text.startswith("/") or ".." in PurePath(text).parts):
        raise _refused(flag, value, "it must be an absolute path without '..'")
    return text


def _number(flag: Flag, value: Value) -> str:
    whole = flag.kind == "int"
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise _refused(flag, value, f"it must be a {'whole ' if whole else ''}number")
    if not math.isfinite(value):
        raise _refused(flag, value, "it must be a finite number")
    if flag.least is not None and value < flag.least or flag.most is not None and value > flag.most:
        most = f" and at most {flag.most:g}" if flag.most is not None else ""
        raise _refused(flag, value, f"it must be at least {flag.least:g}{most}")
    return str(value)


def _refused(flag: Flag, value: Value, allowed: str) -> ConfigError:
    return ConfigError(f"found {value!r}; {allowed}", key=flag.name, value=value)


def _unknown(name: str, tool: str, version: str, about: Tool) -> str:
    known = [*about.common, *about.flags]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{tool} {version} has no such option here; {hint}There are {', '.join(known)}"
