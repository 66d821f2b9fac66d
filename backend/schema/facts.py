"""Where a setting comes from, and when it matters: facts of the schema that no value depends on.

`SOURCE`s are shown beside the help. A condition names another setting by its key: one of the same section, else one
by its dotted path from the top of the file. Nothing but the form hides a setting that does not matter; the file keeps
it, and it is checked as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

GUIDES = "Nyuntam's guides"
AWQ_GUIDE = "Nyuntam's guide to AutoAWQ"
AQLM_GUIDE = "Nyuntam's guide to AQLM"
TENSORRT_GUIDE = "Nyuntam's guide to TensorRT-LLM"
NYUNTAM = "Nyuntam's code"
TENSORRT_EXAMPLE = "Nyuntam's example file for TensorRT-LLM"
LLM_COMPRESSOR = "llm-compressor"
MODELOPT = "nvidia-modelopt"
TENSORRT = "TensorRT-LLM"
LM_EVAL = "lm-eval"
OWN = "Quantdeck"


def llm_compressor(modifier: str, field: str) -> str:
    """The source of a setting that is a field of one of llm-compressor's modifiers."""
    return f"{LLM_COMPRESSOR}, {modifier}.{field}"


@dataclass(frozen=True)
class When:
    """Another setting has one of some values, or none of them.

    Attributes:
        key: The other setting.
        values: The values; None stands for an empty one. Of a list one item is enough.
        is_not: Whether it must have something else than these.
    """

    key: str
    values: tuple[Any, ...]
    is_not: bool = False

    def holds(self, value: Any) -> bool:
        """Whether it does, with this value of the other setting."""
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return any((_plain(item) in self.values) is not self.is_not for item in items or [None])

    def __str__(self) -> str:
        words = ["empty" if value is None else _word(value) for value in self.values]
        if not self.is_not:
            return f"`{self.key}` is {' or '.join(words)}"
        if self.values == (None,):
            return f"`{self.key}` is given"
        return f"`{self.key}` is {'not' if len(words) == 1 else 'none of'} {', '.join(words)}"


Conditions = tuple[tuple[When, ...], ...]
"""All of them have to hold; of each, one part is enough."""


def when(key: str, *values: Any) -> When:
    """The other setting has one of these values."""
    return When(key, values)


def unless(key: str, *values: Any) -> When:
    """The other setting has none of these values."""
    return When(key, values, is_not=True)


def conditions(given: When | Sequence[When | tuple[When, ...]]) -> Conditions:
    """Conditions as they are declared: one, or several that all have to hold; a tuple in the list is an `or`."""
    if isinstance(given, When):
        return ((given,),)
    return tuple(one if isinstance(one, tuple) else (one,) for one in given)


def matters(found: Conditions, value_of: Callable[[str], Any]) -> bool:
    """Whether a setting with these conditions changes anything.

    Args:
        found: Its conditions.
        value_of: The value that holds for another setting, by the key that its condition has.
    """
    return all(any(part.holds(value_of(part.key)) for part in one) for one in found)


def full_key(section: Sequence[str], key: str, known: Container[str]) -> str:
    """The dotted path of the setting that a condition's key names.

    Args:
        section: The path of the section that the condition belongs to.
        key: The condition's key.
        known: Dotted paths of all settings.
    """
    own = ".".join((*section, key))
    return own if own in known else key


def told(found: Conditions) -> str:
    """The conditions in words, e.g. `ENABLED` is true; empty without any."""
    alone = len(found) == 1
    rows = [
        " or ".join(map(str, one)) if alone or len(one) == 1 else f"({' or '.join(map(str, one))})" for one in found
    ]
    return " and ".join(rows)


def _plain(value: Any) -> Any:
    return None if value == "" else value


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
