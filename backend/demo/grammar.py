"""Random text from templates: ``[one|other]`` chooses, ``{name}`` inserts.

The templates themselves are plain text in `phrases/`, so that sentences can be read and added without code.
"""

from __future__ import annotations

import random
import re
from functools import cache
from pathlib import Path

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiouAEIOU])")
_PHRASES = Path(__file__).resolve().parent / "phrases"

Sections = dict[str, list[list[str]]]


@cache
def load_phrases(name: str) -> Sections:
    """Read `phrases/<name>.txt`.

    ``## title`` starts a section; blank lines part a section into groups; every other line is one template.
    """
    sections: Sections = {}
    groups: list[list[str]] = []
    for line in (_PHRASES / f"{name}.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            groups = sections.setdefault(line[3:].strip(), [])
            groups.append([])
        elif not line.strip():
            if groups and groups[-1]:
                groups.append([])
        elif not line.startswith("# "):
            groups[-1].append(line.strip())
    return {title: [group for group in groups if group] for title, groups in sections.items()}


@cache
def words(name: str) -> list[str]:
    """One list of `phrases/words.txt`, where each line is ``name: value, value, ...``."""
    for line in (_PHRASES / "words.txt").read_text(encoding="utf-8").splitlines():
        title, _, values = line.partition(": ")
        if title == name:
            return values.split(", ")
    raise KeyError(name)


def expand(rng: random.Random, template: str, **slots: str) -> str:
    """Fill one template: resolve choices from the inside out, insert slots, mend ``a``/``an``.

    A slot written with a capital (``{Hero}``) inserts the value of its lower-case name, capitalised.
    """
    text = template
    while "[" in text:
        text = _CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), text)
    capitals = {name.capitalize(): capitalised(value) for name, value in slots.items() if name.islower()}
    return _ARTICLE.sub(r"\1n ", text.format_map({**capitals, **slots}))


def capitalised(text: str) -> str:
    """`text` with its first letter in upper case and the rest as it was."""
    return text[:1].upper() + text[1:]


def listed(items: list[str]) -> str:
    """``["a", "b", "c"]`` as ``"a, b and c"``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
