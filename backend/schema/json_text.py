"""A job file in JSON: the same keys; kept and written as YAML from then on."""

from __future__ import annotations

import json
from typing import Any

from backend.errors import ConfigError
from backend.schema.errors import UnreadableFile


def is_json(text: str) -> bool:
    """Whether a file is meant as JSON: it is one object in braces."""
    return text.removeprefix("\ufeff").lstrip().startswith("{")


def json_values(text: str) -> dict[str, Any]:
    """The keys and values of a JSON file.

    Raises:
        ConfigError: If it is not JSON, has a key twice, or a number that is none.
    """
    text = text.removeprefix("\ufeff")
    try:
        values = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)
        json.dumps(values, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise UnreadableFile("JSON", error.msg, text, error.lineno, error.colno) from None
    except UnicodeEncodeError:
        raise ConfigError(r"this JSON has half a character, \ud800 to \udfff alone, which no text has") from None
    except RecursionError:
        raise UnreadableFile("JSON", "it is nested too deeply", text) from None
    except ValueError as error:  # a number with thousands of digits
        raise UnreadableFile("JSON", str(error).partition(";")[0], text) from None
    assert isinstance(values, dict)  # it began with a brace
    return values


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ConfigError(f"found the key {key} twice", key=key)
        found[key] = value
    return found


def _no_number(word: str) -> Any:
    raise ConfigError(f"found {word}; it must be a finite number")
