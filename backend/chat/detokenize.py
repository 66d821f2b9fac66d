"""Text of a growing token sequence, without half characters."""

from __future__ import annotations

from collections.abc import Callable

_REPLACEMENT = "\ufffd"
_COMPACT_AT = 48
_KEEP = 8


class IncrementalDecoder:
    """Turns tokens into text as they come.

    A character may be spread over several tokens; decoding its first bytes gives U+FFFD. A trailing run of
    U+FFFD is therefore held back until more tokens complete it, or show that it is really there.

    Args:
        decode: Decodes a list of token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # only the recent ones: decoding everything at each step would be quadratic
        self._emitted = 0  # characters of the decoded recent ids that were given out

    def add(self, token: int) -> str:
        """Take one more token; returns the new text, empty while a character is incomplete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        whole = len(text.rstrip(_REPLACEMENT))
        new = text[self._emitted : whole]
        self._emitted = max(self._emitted, whole)
        if len(self._ids) >= _COMPACT_AT and whole == len(text):
            self._compact()
        return new

    def _compact(self) -> None:
        """Forget old tokens, unless the cut would go through a character."""
        recent = self._ids[-_KEEP:]
        text = self._decode(recent)
        if _REPLACEMENT not in text:
            self._ids, self._emitted = recent, len(text)
