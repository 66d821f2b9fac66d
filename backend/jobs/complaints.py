"""Errors of something that is tried again and again: told when they come and when they change, not at every try."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

from backend.errors import QuantdeckError


class Complaints:
    """Keeps a loop going through errors, and its log short.

    Args:
        log: Where they are told.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log
        self._last: dict[str, str] = {}

    @contextlib.contextmanager
    def told(self, about: str, *, through: type[Exception] | tuple[type[Exception], ...] = ()) -> Iterator[None]:
        """An error inside the block (a full disk, a defect) is told, and what follows the block goes on.

        Args:
            about: What is tried; errors are compared with the last one of the same name.
            through: Errors that are not met here.
        """
        try:
            yield
        except through:
            raise
        except (QuantdeckError, OSError) as error:
            self._tell(about, str(error), trace=False)
        except Exception as error:
            self._tell(about, f"internal error, {type(error).__name__}: {error}", trace=True)
        else:
            self._last.pop(about, None)

    def _tell(self, about: str, text: str, *, trace: bool) -> None:
        if self._last.get(about) != text:
            self._log.error("%s: %s", about, text, exc_info=trace)
        self._last[about] = text
