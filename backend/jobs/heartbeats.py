"""Heartbeats: counters in the job store that runners count up, judged by the watcher's own monotonic clock."""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Literal

Attempt = tuple[str, int]

AWAY_S = 10.0
"""A pause between two rounds after which everything is watched anew: it was the watcher that stood still."""


class Heartbeats:
    """Notices counters that stand still.

    Args:
        clock: Seconds that only go forward.
        stalled_s: How long a counter has to stand still.
    """

    def __init__(self, clock: Callable[[], float], stalled_s: float) -> None:
        self.stalled_s = stalled_s
        self._clock = clock
        self._seen: dict[Attempt, tuple[int, float]] = {}
        self._round_at = clock()

    def begin_round(self) -> None:
        """Call before each round of `look`."""
        if self._clock() - self._round_at > AWAY_S:
            self._seen.clear()
        self._round_at = self._clock()

    def look(self, attempt: Attempt, count: int) -> Literal["beats", "silent", "unknown"]:
        """What a counter says: it went on since the last look, has stood still for too long, or neither."""
        at = self._clock()
        if attempt not in self._seen:
            self._seen[attempt] = (count, at)
            return "unknown"
        before, since = self._seen[attempt]
        if count != before:
            self._seen[attempt] = (count, at)
            return "beats"
        return "silent" if at - since >= self.stalled_s else "unknown"

    def keep_only(self, attempts: Set[Attempt]) -> None:
        """Forget all others."""
        self._seen = {attempt: seen for attempt, seen in self._seen.items() if attempt in attempts}
