"""A job's log: written line by line, bounded on disk, without secrets, whatever a program prints.

Everything that a program may do to a log is met here: progress bars that overwrite themselves, lines of 50 MB, bytes
that are no text, escape sequences, thousands of lines a second, tokens. What is written are whole lines of plain
text. The log is a row of files, `log.log` (the newest), `log.log.1`, `log.log.2`, ...
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import select
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from backend.jobs.redact import KEY_BEGIN, KEY_END, LONGEST_SECRET, environment_redactor

PART_LINE = re.compile(r"\.\.\. \[part (\d+) of the log, begun \S+\]")
"""First line of every file of a log but the first: no two files begin alike, so no reader takes one for another."""

CHUNK = 1 << 16
PIPE_BYTES = 1 << 20
BAR_EVERY_S = 1.0
BYTES_PER_S = 1 << 20
BURST_BYTES = 16 << 20
LINE_COST = 256
"""The rate limit: so many bytes a second, after a burst; a line counts as this many at least."""
KEPT_OF_LEFT_OUT = 100
"""So many of the last lines before the limit allows more are written all the same: they tell why a program ended."""
KEY_LINES = 200
LOOK_EVERY_S = 1.0

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, cursor moves
    r"|\x1b[\]PX^_][^\x07\x1b\x9c]*(?:\x07|\x1b\\|\x9c)?"  # titles, links
    r"|\x1b[ -/]*[0-~]|\x1b"
)
# Control characters; those that turn the direction of text round, or that some programs take for a new line.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x84\x86-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_BREAKS = re.compile(r"[\x85\u2028\u2029]")
_KEY_BODY = re.compile(r"[A-Za-z0-9+/=]{40,}")
_KEY_REST = re.compile(r"\s*(?:[A-Za-z0-9+/=]*|(?:Proc-Type|DEK-Info|Version|Comment|Hash): .*)\s*")


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


class LineStream:
    """Makes clean lines of the bytes that one program or thread writes. Made by `LogWriter.stream`."""

    def __init__(self, writer: LogWriter, *, limited: bool) -> None:
        self._writer = writer
        self._limited = limited
        self._lock = threading.Lock()
        self._rest = b""  # the unfinished line, as far as it is kept
        self._cut = 0  # bytes of it that were not kept
        self._state: bytes | _Long = b""  # the last complete state of a progress bar, if it is not written yet
        self._bar_at = 0.0
        self._key_lines = 0  # how many lines of a private key block may still follow
        self._allowance = float(BURST_BYTES)
        self._filled_at = time.monotonic()
        self._left_out = 0
        self._left_out_at = 0.0
        self._last_left_out: deque[bytes | _Long] = deque(maxlen=KEPT_OF_LEFT_OUT)
        self._recent: deque[bytes | _Long] = deque(maxlen=KEPT_OF_LEFT_OUT)
        self._kept_bytes = writer.line_bytes + LONGEST_SECRET

    def feed(self, data: bytes) -> None:
        """Take bytes as they come, cut anywhere."""
        with self._lock:
            for start in range(0, len(data), CHUNK):
                self._take(data[start : start + CHUNK])

    def poll(self) -> None:
        """Write the state of a bar that pauses and tell of lines left out; for times when nothing comes."""
        with self._lock:
            self._show_bar()
            if self._left_out and time.monotonic() - self._left_out_at >= 1.0:
                self._tell_left_out()

    def end(self) -> None:
        """Write the unfinished line and whatever else waits: no more will come."""
        with self._lock:
            if self._rest or self._cut or self._state:
                line = self._finish(b"")
                if line is not None:
                    self._lines([line])
            if self._left_out:
                self._tell_left_out()
        self._writer.forget(self)

    def last(self, n: int = 20) -> list[str]:
        """The last lines, as they are written, rate limit or not; for telling why a program ended."""
        with self._lock:
            return self._clean(list(self._recent)[-n:])

    def _take(self, data: bytes) -> None:
        if b"\r" in data:
            data = data.replace(b"\r\n", b"\n")
        head, newline, tail = data.rpartition(b"\n")
        lines: list[bytes | _Long] = []
        if newline:
            first, *others = head.split(b"\n")
            line = self._finish(first)
            if line is not None:
                lines.append(line)
            if b"\r" in head:
                others = [_last_state(line) for line in others]
            lines += others
        self._continue(tail)
        if lines:
            self._lines(lines)
        self._show_bar()

    def _continue(self, data: bytes) -> None:
        """Append to the unfinished line."""
        before, overwritten, data = data.rpartition(b"\r")
        if overwritten:
            under_way, _, later = before.partition(b"\r")
            state = _last_state(later)
            if state.strip():
                self._state = self._kept(state, 0)
            elif self._rest.strip() or under_way.strip():  # the state that was under way ends here
                self._state = self._kept(self._rest + under_way, self._cut)
            self._rest, self._cut = b"", 0
        room = self._kept_bytes - len(self._rest)
        self._rest += data[:room]
        self._cut += max(0, len(data) - room)

    def _finish(self, data: bytes) -> bytes | _Long | None:
        """The line under way, ended by this; None if it was the state of a bar that is written already."""
        self._continue(data)
        line, state, shown = self._kept(self._rest, self._cut), self._state, self._bar_at > 0
        self._rest, self._cut, self._state, self._bar_at = b"", 0, b"", 0.0
        if bytes(line).strip() or not (state or shown):
            return line
        return state or None

    def _kept(self, data: bytes, cut: int) -> bytes | _Long:
        """Bytes of a line as far as they are kept, with the number of those that are not."""
        cut += max(0, len(data) - self._kept_bytes)
        return _Long(data[: self._kept_bytes], cut) if cut else data

    def _show_bar(self) -> None:
        """Write the state of a progress bar, once a second at most."""
        now = time.monotonic()
        if self._state and now - self._bar_at >= BAR_EVERY_S:
            self._bar_at = now
            state, self._state = self._state, b""
            self._lines([state])

    def _lines(self, lines: list[bytes | _Long]) -> None:
        lines = self._without_keys(lines)
        self._recent.extend(lines[-KEPT_OF_LEFT_OUT:])
        if self._limited:
            lines = self._within_rate(lines)
        self._writer.put(self._clean(lines))

    def _within_rate(self, lines: list[bytes | _Long]) -> list[bytes | _Long]:
        now = time.monotonic()
        self._allowance = min(BURST_BYTES, self._allowance + (now - self._filled_at) * BYTES_PER_S)
        self._filled_at = now
        if self._left_out and now - self._left_out_at >= 1.0:
            self._tell_left_out()
        passed = 0
        if not self._left_out:
            for line in lines:
                cost = max(LINE_COST, len(line))
                if cost > self._allowance:
                    break
                self._allowance -= cost
                passed += 1
            if passed == len(lines):
                return lines
            self._left_out_at = now
        within, lines = lines[:passed], lines[passed:]
        self._left_out += len(lines)
        self._last_left_out.extend(lines[-KEPT_OF_LEFT_OUT:])
        return within

    def _tell_left_out(self) -> None:
        lines, missing = list(self._last_left_out), self._left_out - len(self._last_left_out)
        self._last_left_out.clear()
        self._left_out = 0
        self._allowance -= sum(max(LINE_COST, len(line)) for line in lines)
        said = [f"... [{missing} lines left out: more than {BYTES_PER_S >> 20} MiB of log a second]"] if missing else []
        self._writer.put([*said, *self._clean(lines)])

    def _without_keys(self, lines: list[bytes | _Long]) -> list[bytes | _Long]:
        """The lines without the bodies of private key blocks, which only their neighbours tell."""
        if not self._key_lines and not any(b"PRIVATE KEY" in bytes(line) for line in lines):
            return lines
        kept: list[bytes | _Long] = []
        for line in lines:
            text = bytes(line).decode("utf-8", "replace")
            if self._key_lines:
                if KEY_END.search(text):
                    self._key_lines = 0
                    rest = KEY_END.split(text)[-1].strip()
                    kept += [rest.encode()] if rest else []
                    continue
                if _KEY_BODY.search(text) or _KEY_REST.fullmatch(text):
                    self._key_lines -= 1
                    continue
                self._key_lines = 0
            begins = list(KEY_BEGIN.finditer(text))
            if begins and not KEY_END.search(text, begins[-1].end()):
                self._key_lines = KEY_LINES
            kept.append(line)
        return kept

    def _clean(self, lines: list[bytes | _Long]) -> list[str]:
        """Lines as they are written: plain text, without secrets, capped."""
        if not lines:
            return []
        limit = self._writer.line_bytes
        whole = b"\n".join(bytes(line) for line in lines).decode("utf-8", "replace")
        if "\x1b" in whole:
            # Before and after: a torn sequence takes the first letter of what follows it, here of a secret.
            before = self._writer.redactor.lines(whole.split("\n"))
            whole = "\n".join(_ESCAPES.sub("", line) for line in before)
        whole = _BREAKS.sub(" ", _CONTROLS.sub("", whole))
        clean = self._writer.redactor.lines(whole.split("\n"))
        if max(map(len, clean)) * 4 <= limit and not any(isinstance(line, _Long) for line in lines):
            return clean
        return [_capped(text, line, limit) for text, line in zip(clean, lines, strict=True)]


class _Long:
    """The kept beginning of a line of which more was cut."""

    def __init__(self, data: bytes, cut: int) -> None:
        self.data = data
        self.cut = cut

    def __bytes__(self) -> bytes:
        return self.data

    def __len__(self) -> int:
        return len(self.data)


def _capped(text: str, line: bytes | _Long, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    cut = 0
    if isinstance(line, _Long):
        # Its end may be the beginning of a secret that could not be recognised without the rest.
        keep = max(0, len(raw) - LONGEST_SECRET)
        cut, raw = line.cut + len(raw) - keep, raw[:keep]
    if len(raw) > limit:
        cut, raw = cut + len(raw) - limit, raw[:limit]
    return f"{raw.decode('utf-8', 'ignore')} ... [{cut} bytes cut]" if cut else text


def _last_state(line: bytes) -> bytes:
    """What a line shows in the end, after all that was written over."""
    if b"\r" not in line:
        return line
    return next((state for state in reversed(line.split(b"\r")) if state.strip()), b"")


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


def numbered(path: Path, number: int) -> Path:
    """The file of a log that was rotated away so many times; 0 is the newest."""
    return path.with_name(f"{path.name}.{number}") if number else path


def rotated(path: Path) -> list[int]:
    """The numbers of the files of a log besides the newest, in ascending order."""
    found = []
    try:
        names: Any = os.listdir(path.parent)
    except OSError:
        return []
    for name in names:
        number = name[len(path.name) + 1 :]
        if name.startswith(path.name + ".") and number.isascii() and number.isdigit() and number[0] != "0":
            found.append(int(number))
    return sorted(found)
