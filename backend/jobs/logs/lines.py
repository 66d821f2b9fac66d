"""Clean lines out of whatever a program prints, cut anywhere.

Everything that a program may do to a log is met here: progress bars that overwrite themselves, lines of 50 MB, bytes
that are no text, escape sequences, thousands of lines a second, tokens.
"""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from backend.jobs.redact import KEY_BEGIN, KEY_END, LONGEST_SECRET

if TYPE_CHECKING:
    from backend.jobs.logs.writer import LogWriter

CHUNK = 1 << 16
BAR_EVERY_S = 1.0
BYTES_PER_S = 1 << 20
BURST_BYTES = 16 << 20
LINE_COST = 256
"""The rate limit: so many bytes a second, after a burst; a line counts as this many at least."""
KEPT_OF_LEFT_OUT = 100
"""So many of the last lines before the limit allows more are written all the same: they tell why a program ended."""
KEY_LINES = 200

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
