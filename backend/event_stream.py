"""Progress of a child process as JSON lines on its standard output.

Libraries print: progress bars, banners, warnings. One stray line would break the reader of the events, so
the writer takes the real standard output for itself and sends everybody else's output to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

from backend.jobs.redact import redact_all

Progress = Callable[[int, int, str], None]
"""Called with (step, total, message) while something is being measured."""


class EventWriter:
    """Writes one JSON object per line and flushes it; safe to call from several threads.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.Lock()

    @classmethod
    def claim_stdout(cls) -> EventWriter:
        """Take file descriptor 1 for events; from now on `print` and C code write to standard error."""
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        return cls(os.fdopen(own, "w", encoding="utf-8", buffering=1))

    def send(self, event: dict[str, Any]) -> None:
        """Write one event, without the secrets that its texts may hold.

        Raises:
            BrokenPipeError: If the reader has gone.
        """
        line = json.dumps(redact_all(event), ensure_ascii=False)
        with self._lock:
            self._stream.write(line + "\n")
            self._stream.flush()

    def note(self, **event: Any) -> None:
        """Write an event with the present time and these keys."""
        self.send({"t": time.time(), **event})

    def progress(self, stage: str, step: int, total: int, message: str) -> None:
        """Write a progress event: `step` of `total` units of `stage` are done."""
        self.note(stage=stage, step=step, total=total, message=message)

    def error(self, error: Exception, message: str) -> None:
        """Write the failure that ends the process, with the name of its type."""
        self.send({"t": time.time(), "stage": "error", "kind": type(error).__name__, "message": message})
