"""What a job file says, for a person who opens it: understood, kept without effect, wrong; each with its line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import ConfigError, ConfigErrors
from backend.schema import reference
from backend.schema.document import Document
from backend.schema.job import ALGORITHMS
from backend.schema.odd_keys import section_at, unknown_keys


@dataclass(frozen=True)
class Remark:
    """Something about one key of a file.

    Attributes:
        key: Dotted path.
        text: What there is to say, without key and line.
        line: Where it stands, from 1; 0 if it does not stand in the file.
    """

    key: str
    text: str
    line: int


@dataclass(frozen=True)
class Report:
    """A file, looked at.

    Attributes:
        understood: Part of the form -> how many of its settings the file gives.
        wrong: What keeps the job from starting, as far as the file alone tells.
        unknown: Keys that the schema does not have.
        unread: Keys that other programs have, and sections of other algorithms.
    """

    understood: Mapping[str, int]
    wrong: tuple[Remark, ...]
    unknown: tuple[Remark, ...]
    unread: tuple[Remark, ...]


def report(document: Document) -> Report:
    """Look at a file without looking at the model, the text or the machine."""
    values = document.values
    try:
        _ = document.config
        wrong: tuple[Remark, ...] = ()
    except ConfigErrors as error:
        found = [Remark(one.key, one.detail, line(document, one.key)) for one in error.errors]
        wrong = tuple(sorted(found, key=lambda remark: (not remark.line, remark.line)))
    unknown = tuple(
        Remark(
            ".".join(one.path),
            f"did you mean {one.near}?" if one.near else "",
            (document.line_of(one.path) or 0) + 1,
        )
        for one in unknown_keys(values)
    )
    bad = {remark.key for remark in wrong}
    understood: Counter[str] = Counter()
    unread = []
    chosen = values.get("ALGORITHM")
    for setting in reference.settings():
        section = section_at(values, setting.path[:-1])
        if setting.path[-1] not in section:
            continue
        if setting.spec.ignored:
            if section[setting.path[-1]] not in (None, ""):
                unread.append(Remark(setting.key, setting.spec.help, line(document, setting.key)))
        elif setting.key not in bad and (setting.path[0] != "llm" or setting.path[1] == chosen):
            understood[setting.path[1] if setting.path[0] == "llm" else setting.spec.section] += 1
    for name in section_at(values, ("llm",)):
        if name in ALGORITHMS and name != chosen:
            unread = [remark for remark in unread if not remark.key.startswith(f"llm.{name}.")]
            text = f"ALGORITHM is {chosen}, so nothing in this section is read."
            unread.append(Remark(f"llm.{name}", text, line(document, f"llm.{name}")))
    return Report(dict(understood), wrong, unknown, tuple(sorted(unread, key=lambda remark: remark.line)))


def line(document: Document, key: str) -> int:
    """The line of a dotted key in the file that was read, from 1; 0 if it does not stand there."""
    found = document.line_of(key.split("."))
    return 0 if found is None else found + 1


def with_lines(document: Document, error: ConfigErrors) -> ConfigErrors:
    """The same problems, each with the line in which its key stands."""
    return ConfigErrors(
        [ConfigError(e.detail, key=e.key, value=e.value, line=e.line or line(document, e.key)) for e in error.errors]
    )


def warnings_with_lines(document: Document) -> list[str]:
    """The document's warnings, which begin with a key, each with the line of that key."""
    found = []
    for text in document.warnings:
        number = line(document, text.partition(":")[0].partition(",")[0])
        found.append(f"line {number}: {text}" if number else text)
    return found


def told_with_lines(document: Document, check: Callable[[], Any]) -> Any:
    """The answer of a check of this document; its problems with their lines.

    Raises:
        ConfigErrors: As `check` does.
    """
    try:
        return check()
    except ConfigErrors as error:
        raise with_lines(document, error) from None
