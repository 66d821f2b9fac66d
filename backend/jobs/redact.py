"""Secrets taken out of text before it is written anywhere: logs, events, reasons, the job store.

Three kinds are found: values that the environment holds under a telling name (`HF_TOKEN`, `AWS_SECRET_ACCESS_KEY`),
secrets with a shape of their own (`hf_...`, `AKIA...`, JSON web tokens, private key blocks), and whatever stands
where a secret stands (after `password=`, after `Authorization:`, before the `@` of an address). Standard library
only: stage programs in environments of their own import this too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

REDACTED = "[redacted]"
LONGEST_SECRET = 4096
"""Secrets of this many characters at most are found whole; of longer ones the beginning."""

_TELLING = re.compile(r"TOKEN|KEY|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL", re.IGNORECASE)
_HARMLESS = frozenset({"TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "SSH_ASKPASS"})
_SHORTEST_VALUE = 6  # of a variable: "1" and "true" stand in too many lines to be taken out of them
_SHORTEST_LINE = 16  # of a variable's value of several lines, such as a key

KEY_BEGIN = re.compile(r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")
KEY_END = re.compile(r"-----END [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----")

# What stands after a name: a quoted text, or a word. Redacting again must not take more.
_VALUE = r"""(?!\[redacted)(?:"[^"\n]*"?|'[^'\n]*'?|[^\s"',;&]+)"""
_LONG_VALUE = r"""(?!\[redacted)(?:["']?[^\s"',;&<]{6,}["']?|"[^"\n]{6,}"?|'[^'\n]{6,}'?)"""
_IS = r"""["']?[ \t]*(?:=>|[=:])[ \t]*"""


class _Rule:
    """A pattern, what takes its matches' place, and words (lower case) without which a text cannot match."""

    def __init__(self, words: Iterable[str], pattern: str, put: str | Callable[[re.Match[str]], str], flags: int = 0):
        self.words = tuple(words)
        self.pattern = re.compile(pattern, flags)
        self.put = put

    def apply(self, text: str, lowered: str) -> str:
        return self.pattern.sub(self.put, text) if any(word in lowered for word in self.words) else text


_RULES = (
    _Rule(
        ("private key",),
        KEY_BEGIN.pattern + r"(?s:.*?)(?:" + KEY_END.pattern + r"|\Z)",
        "[private key redacted]",
    ),
    _Rule(
        ("hf_", "api_org_", "sk-", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "glpat-", "npm_", "pypi-"),
        r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{20,}|gh[pousr]_[A-Za-z0-9]{16,}"
        r"|github_pat_[A-Za-z0-9_]{20,}|glpat-[A-Za-z0-9_-]{16,}|npm_[A-Za-z0-9]{30,}|pypi-[A-Za-z0-9_-]{30,})",
        REDACTED,
    ),
    _Rule(
        ("akia", "asia", "aiza", "xox", "eyj"),
        r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])|AIza[A-Za-z0-9_-]{30,}|xox[abeoprs]-[A-Za-z0-9-]{10,}"
        r"|eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?)",
        REDACTED,
    ),
    _Rule(("://",), r"(://)[^/\s\"'<>]*@", rf"\1{REDACTED}@"),
    _Rule(
        ("authorization",),
        r"((?:proxy-)?authorization" + _IS + r")([\"']?)(?:(?:bearer|basic|token|digest)[ \t]+)?[^\s\"',}]+",
        rf"\1\2{REDACTED}",
        re.IGNORECASE,
    ),
    _Rule(("bearer",), r"\b(bearer[ \t]+)(?=[^\s\"']*\d|[^\s\"']{16})[A-Za-z0-9._~+/=-]{8,}", rf"\1{REDACTED}", re.I),
    _Rule(("cookie",), r"((?:set-)?cookie" + _IS + r")[^\n]+", rf"\1{REDACTED}", re.IGNORECASE),
    _Rule(
        ("token=", "key=", "secret=", "password=", "sig=", "signature=", "credential=", "code="),
        r"([?&](?:[A-Za-z0-9_-]{1,40}[_-])?(?:token|key|apikey|secret|password|passwd|sig|signature|credential|code)=)"
        r"[^&\s\"'<>]+",
        rf"\1{REDACTED}",
        re.IGNORECASE,
    ),
    _Rule(  # as an environment is dumped: upper case
        ("token", "key", "credential"),
        r"((?<![A-Za-z])(?:TOKEN|KEY|APIKEY|CREDENTIALS?)(?:_[A-Z0-9_]{1,40})?" + _IS + r")" + _LONG_VALUE,
        rf"\1{REDACTED}",
    ),
    _Rule(
        ("secret", "passw", "passphrase"),
        r"((?:secret|password|passwd|passphrase)(?:_[a-z0-9_]{1,40})?" + _IS + r")" + _VALUE,
        rf"\1{REDACTED}",
        re.IGNORECASE,
    ),
    _Rule(
        ("key", "token"),
        r"((?:(?:api|access|private|auth|account|encryption|signing)[_-]?key|(?:auth|access|refresh|hf|id|session|bearer)"
        r"[_-]?token)" + _IS + r")" + _LONG_VALUE,
        rf"\1{REDACTED}",
        re.IGNORECASE,
    ),
    _Rule(("token",), r"(\btoken" + _IS + r")[\"']?[A-Za-z0-9._~+/=-]{20,}[\"']?", rf"\1{REDACTED}", re.IGNORECASE),
)  # fmt: skip
_WORDS = tuple(dict.fromkeys(word for rule in _RULES for word in rule.words))


class Redactor:
    """Takes secrets out of text.

    Args:
        values: Texts that are secrets, whatever they look like.
    """

    def __init__(self, values: Iterable[str] = ()) -> None:
        known = sorted(set(values), key=len, reverse=True)  # the longest first: one may begin like another
        self._values = re.compile("|".join(map(re.escape, known))) if known else None
        self._known = known

    def __call__(self, text: str) -> str:
        """The text with `[redacted]` in place of every secret."""
        if self._values is not None and any(value in text for value in self._known):
            text = self._values.sub(REDACTED, text)
        lowered = text.lower()
        if not any(word in lowered for word in _WORDS):
            return text
        for rule in _RULES:
            text = rule.apply(text, lowered)
        return text

    def lines(self, lines: list[str]) -> list[str]:
        """Each line redacted by itself; quick where there is nothing to redact."""
        whole = "\n".join(lines)
        lowered = whole.lower()
        suspicious = [word for word in _WORDS if word in lowered]
        known = [value for value in self._known if value in whole]
        if not suspicious and not known:
            return lines
        return [self(line) for line in lines]


def secret_values(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The values of an environment's variables with telling names, as they may be written in a text."""
    found: set[str] = set()
    for name, value in environment.items():
        if not _TELLING.search(name) or name.upper() in _HARMLESS or len(value.strip()) < _SHORTEST_VALUE:
            continue
        value = value.strip()
        lines = [line.strip() for line in value.splitlines() if len(line.strip()) >= _SHORTEST_LINE]
        for text in [value, *(lines if "\n" in value else [])]:
            found.update((text, quote(text, safe=""), json.dumps(text)[1:-1], repr(text)[1:-1]))
    return tuple(sorted(found))


@lru_cache(maxsize=4)
def _redactor(values: tuple[str, ...]) -> Redactor:
    return Redactor(values)


_remembered: set[str] = set()


def remember_secret(value: str) -> None:
    """Have a secret that this process was given, and that no variable holds, taken out of all text from now on."""
    _remembered.add(value.strip())


def environment_redactor() -> Redactor:
    """A redactor that knows the secrets of this process's environment, and those it was told to remember."""
    told = {f"SECRET_{number}": value for number, value in enumerate(sorted(_remembered))}
    return _redactor(secret_values({**os.environ, **told}))


def redact(text: str) -> str:
    """A text without secrets, for events, reasons and the job store.

    Args:
        text: Any text, of any number of lines.
    """
    return environment_redactor()(text)


def redact_all(value: Any) -> Any:
    """A copy of a JSON value with every text in it redacted."""
    return _redacted(value, environment_redactor())


def _redacted(value: Any, redactor: Redactor) -> Any:
    if isinstance(value, str):
        return redactor(value)
    if isinstance(value, Mapping):
        return {key: _redacted(item, redactor) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_redacted(item, redactor) for item in value]
    return value
