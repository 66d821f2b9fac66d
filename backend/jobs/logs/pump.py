"""Taking what a program writes to a pipe into the log, so that it never has to wait."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import threading
import time

from backend.jobs.logs.lines import CHUNK
from backend.jobs.logs.writer import LogWriter

PIPE_BYTES = 1 << 20


class LogPump:
    """A thread that takes what a program writes to a pipe to the log, from now until the end of the pipe or `stop`.

    Args:
        stream_fd: The reading end. It belongs to the pump, which closes it.
        writer: The log.
    """

    def __init__(self, stream_fd: int, writer: LogWriter) -> None:
        self._fd = stream_fd
        self._stream = writer.stream()
        self._wake_r, self._wake_w = os.pipe()
        self._wake_lock = threading.Lock()
        self._stop_by = float("inf")
        self._ended = threading.Event()
        with contextlib.suppress(OSError):  # room for bursts; Linux allows a user a limited number of large pipes
            fcntl.fcntl(stream_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._thread = threading.Thread(target=self._run, name="log-pump", daemon=True)
        self._thread.start()

    def __enter__(self) -> LogPump:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the pipe; False if some process still holds it open then."""
        return self._ended.wait(timeout_s)

    def stop(self, drain_s: float = 2.0) -> None:
        """Take what is in the pipe now and end, even if some process still holds the pipe open.

        Args:
            drain_s: How long to go on reading at most if that process writes all the time, seconds.
        """
        with self._wake_lock:
            if not self._ended.is_set():
                self._stop_by = time.monotonic() + drain_s
                os.write(self._wake_w, b"x")
        self._thread.join(drain_s + 10.0)

    def last(self, n: int = 20) -> list[str]:
        """The last lines of the program, clean and without secrets."""
        return self._stream.last(n)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN | select.POLLHUP)
        poll.register(self._wake_r, select.POLLIN)
        try:
            while time.monotonic() < self._stop_by:
                stopping = self._stop_by != float("inf")
                ready = dict(poll.poll(0 if stopping else 500))
                if self._fd not in ready:
                    if stopping:
                        break
                    self._stream.poll()
                    continue
                try:
                    data = os.read(self._fd, CHUNK)
                except OSError:
                    break
                if not data:
                    break
                self._take(data)
        finally:
            with contextlib.suppress(Exception):
                self._stream.end()
            with self._wake_lock:
                for fd in (self._fd, self._wake_r, self._wake_w):
                    os.close(fd)
                self._ended.set()

    def _take(self, data: bytes) -> None:
        try:
            self._stream.feed(data)
        except Exception:  # whatever is wrong with the log, a program whose pipe nobody reads would stall for ever
            logging.getLogger("quantdeck.logs").debug("a piece of the log was lost", exc_info=True)
