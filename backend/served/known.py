"""What the allowed servers offer, as far as is known: asked seldom, and never by a page that is being loaded."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from backend.errors import EngineError
from backend.served.client import list_models

FRESH_S = 30.0
AT_ONCE = 8


@dataclass(frozen=True)
class Found:
    """One server.

    Attributes:
        url: Its base URL.
        models: Ids of its models; empty if it cannot be used.
        reason: Why not; empty if it can.
    """

    url: str
    models: tuple[str, ...] = ()
    reason: str = ""


class KnownServers:
    """The last answers of all servers, for all visitors. All methods may be called from any thread."""

    def __init__(self) -> None:
        self._found: tuple[Found, ...] = ()
        self._asked = float("-inf")
        self._urls: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def found(self) -> tuple[Found, ...]:
        """What is known now; asks nobody."""
        return self._found

    def look(self, urls: Sequence[str], fresh_s: float = FRESH_S) -> tuple[Found, ...]:
        """What the servers offer; those who ask at the same time share one round.

        Args:
            urls: The setting `[served] urls`.
            fresh_s: Answers that are no older than this are taken as they are, seconds.
        """
        with self._lock:
            if self._urls != tuple(urls) or time.monotonic() - self._asked > fresh_s:
                with ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="served-list") as pool:
                    self._found = tuple(pool.map(_ask, urls))
                self._urls, self._asked = tuple(urls), time.monotonic()
            return self._found


def _ask(url: str) -> Found:
    try:
        return Found(url, list_models(url))
    except EngineError as error:
        return Found(url, reason=error.message)
