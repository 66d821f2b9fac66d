"""The one writer of a log: bounded files, whole lines, no secrets, and no error that would stop a job."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from backend.jobs.logs.files import PART_LINE, numbered, rotated
from backend.jobs.logs.lines import LineStream
from backend.jobs.redact import environment_redactor

LOOK_EVERY_S = 1.0


class Limits(Protocol):
    """How large a log may become (`Settings.jobs`)."""

    @property
    def log_bytes(self) -> int:
        """Size of one file at most."""

    @property
    def log_files(self) -> int:
        """Number of files at most, the newest included."""

    @property
    def line_bytes(self) -> int:
        """Length of one line at most; the rest of it is cut."""


class LogWriter:
    """The one writer of a log; any number of threads may use it.

    A full disk stops neither the program nor its pump: lines that could not be written are counted, and the count is
    written when there is room again.

    Args:
        path: The newest file; its folder is made if absent. An existing log is continued.
        limits: How large it may become.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self.path = path
        self.limits = limits
        self.line_bytes = min(limits.line_bytes, limits.log_bytes // 4)
        self.redactor = environment_redactor()
        self._lock = threading.RLock()
        self._fd = -1
        self._size = self._part = self._unwritten = 0
        self._looked_at = 0.0
        self._streams: list[LineStream] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._open()
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
        self._default = self.stream()

    def __enter__(self) -> LogWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stream(self, *, limited: bool = True) -> LineStream:
        """A source of lines of its own: its unfinished line is not mixed with those of others.

        Args:
            limited: Whether the rate limit holds for it.
        """
        stream = LineStream(self, limited=limited)
        with self._lock:
            self._streams.append(stream)
        return stream

    def write(self, data: bytes | str) -> None:
        """Take bytes of a program; what ends in no new line yet waits for the rest."""
        self._default.feed(data.encode("utf-8", "replace") if isinstance(data, str) else data)

    def line(self, text: str) -> None:
        """Write a message of our own, of one or more lines, at once and outside of the rate limit."""
        stream = LineStream(self, limited=False)
        stream.feed(text.encode("utf-8", "replace"))
        stream.end()

    def close(self) -> None:
        """Write what still waits and close the file."""
        with self._lock:
            for stream in list(self._streams):
                stream.end()
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def forget(self, stream: LineStream) -> None:
        """Drop a stream that has ended."""
        with self._lock, contextlib.suppress(ValueError):
            self._streams.remove(stream)

    def put(self, lines: list[str]) -> None:
        """Append lines that are clean, capped and redacted."""
        if not lines:
            return
        with self._lock:
            try:
                self._look()
                if self._unwritten:
                    self._append([f"... [lines that could not be written, the disk was full: {self._unwritten}]"])
                    self._unwritten = 0
                self._append(lines)
            except OSError:
                # The job must not fail, nor its program stall, for the sake of its log.
                self._unwritten += len(lines)

    def _append(self, lines: list[str]) -> None:
        batch: list[bytes] = []
        size = 0
        for line in lines:
            raw = line.encode("utf-8", "replace") + b"\n"
            if self._size + size + len(raw) > self.limits.log_bytes and self._size + size > 0:
                self._flush(batch)
                self._rotate()
                batch, size = [], 0
            batch.append(raw)
            size += len(raw)
        self._flush(batch)

    def _flush(self, batch: list[bytes]) -> None:
        data = memoryview(b"".join(batch))
        start = self._size
        try:
            while data:
                n = os.write(self._fd, data)
                self._size += n
                data = data[n:]
        except OSError:
            with contextlib.suppress(OSError):  # a line that is torn is worse than one less
                if os.fstat(self._fd).st_size > start:
                    os.ftruncate(self._fd, start)
                self._size = start
            raise

    def _open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._size = os.fstat(self._fd).st_size
        first = os.pread(self._fd, 200, 0).split(b"\n")[0].decode("utf-8", "replace")
        match = PART_LINE.match(first)
        self._part = int(match.group(1)) if match else 1
        if self._size and os.pread(self._fd, 1, self._size - 1) != b"\n":
            with contextlib.suppress(OSError):  # a writer was killed in the middle of a line
                self._size += os.write(self._fd, b"\n")

    def _look(self) -> None:
        """See now and then whether the file is still the one with our name, and how large it is."""
        now = time.monotonic()
        if self._fd >= 0 and now - self._looked_at < LOOK_EVERY_S:
            return
        self._looked_at = now
        if self._fd >= 0:
            ours = os.fstat(self._fd)
            self._size = ours.st_size
            try:
                named = os.stat(self.path)
            except FileNotFoundError:
                named = None
            if named is not None and (named.st_dev, named.st_ino) == (ours.st_dev, ours.st_ino):
                return
            os.close(self._fd)
            self._fd = -1
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _rotate(self) -> None:
        os.close(self._fd)
        self._fd = -1
        keep = max(1, self.limits.log_files)
        for number in sorted(rotated(self.path), reverse=True):
            old = numbered(self.path, number)
            if number >= keep - 1:
                old.unlink(missing_ok=True)
            else:
                old.rename(numbered(self.path, number + 1))
        if keep > 1:
            self.path.rename(numbered(self.path, 1))
        else:
            self.path.unlink(missing_ok=True)
        part = self._part + 1
        self._open()
        self._part = part
        self._flush([f"... [part {part} of the log, begun {datetime.now(UTC).isoformat()}]\n".encode()])


class LogHandler(logging.Handler):
    """Sends the runner's own messages to the log.

    Args:
        writer: The log.
    """

    def __init__(self, writer: LogWriter) -> None:
        super().__init__()
        self._writer = writer
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            self._writer.line(self.format(record))
        except Exception:
            self.handleError(record)
