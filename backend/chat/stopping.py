"""Ending an answer at a text rather than at a token."""

from __future__ import annotations


class StopText:
    """Passes text on up to a stop text, holding back what could be its beginning.

    Args:
        stop: The text that ends the answer; empty for none.
    """

    def __init__(self, stop: str) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Take more text; returns what can be shown."""
        if not self._stop:
            return text
        text = self._held + text
        at = text.find(self._stop)
        if at >= 0:
            self.found, self._held = True, ""
            return text[:at]
        keep = next((n for n in range(len(self._stop) - 1, 0, -1) if text.endswith(self._stop[:n])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def rest(self) -> str:
        """What was held back when the answer ended for another reason."""
        held, self._held = self._held, ""
        return held
