"""One program of TensorRT-LLM from its start to its end: its output, its time, its memory, and why it ended badly."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import IO

from backend.errors import EngineError
from backend.jobs.devices import gpus
from backend.process import end_descendants, end_tree
from backend.tensorrt_llm.executors import Executor

GRACE_S = (5.0, 5.0)
"""How long a program may take to end after SIGINT, then after SIGTERM."""
POLL_S, SAMPLE_S = 0.05, 0.5
TAIL_LINES, LINE_CHARS = 12, 400
HINTS = {
    "out of memory": "its GPU memory was full: lower KV_CACHE_FRACTION, CONCURRENCY or the lengths",
    "could not select device driver": "docker has no NVIDIA runtime: install the NVIDIA Container Toolkit",
    "No such image": "the image is not there: pull it by hand",
    "permission denied while trying to connect": "this user may not talk to docker's daemon",
    "no kernel image is available": "this GPU is not one that TensorRT-LLM was built for",
    "No GPU devices found": "the program saw no GPU",
}


class MemoryWatch:
    """Memory in use on some GPUs, by the driver.

    Attributes:
        before: Bytes in use when it was made; None if the driver does not answer for all of the GPUs.
        peak: The most since then.
    """

    def __init__(self, uuids: Sequence[str]) -> None:
        self._uuids = set(uuids)
        self._next = 0.0
        self.before = self.peak = self._used()

    def sample(self) -> None:
        """Look again, if it is time."""
        if self.peak is None or time.monotonic() < self._next:
            return
        self._next = time.monotonic() + SAMPLE_S
        self.peak = max(self.peak, self._used() or 0)

    @property
    def taken(self) -> int | None:
        """Bytes that the program took at most."""
        return None if self.peak is None or self.before is None else self.peak - self.before

    def _used(self) -> int | None:
        found = [gpu.used_bytes for gpu in gpus() if gpu.uuid in self._uuids]
        return sum(found) if found and len(found) == len(self._uuids) else None


def run_process(
    argv: Sequence[str],
    executor: Executor,
    name: str,
    *,
    limit_s: float,
    on_line: Callable[[str], None] = lambda line: None,
    on_poll: Callable[[], None] = lambda: None,
) -> None:
    """Run a program until it ends; however this function ends, nothing of the program stays behind.

    Args:
        argv: What to start, as the executor gives it.
        executor: Where it runs.
        name: What the executor calls it.
        limit_s: How long it may run, seconds.
        on_line: Takes each line that it writes; all of them go to our standard error too.
        on_poll: Called many times a second.

    Raises:
        EngineError: If it cannot be started, fails or takes too long, with the end of its output.
    """
    executor.end(name)  # a container that outlived an earlier attempt
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    program = PurePath(argv[0]).name
    try:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=executor.variables(), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise EngineError(f"{argv[0]} cannot be started: {error.strerror}") from error
    assert process.stdout is not None
    reader = threading.Thread(target=_read, args=(process.stdout, tail, on_line), daemon=True)
    try:
        reader.start()
        deadline = time.monotonic() + limit_s
        while process.poll() is None:
            on_poll()
            if time.monotonic() > deadline:
                raise EngineError(f"{program} did not end within {limit_s:g} s and was stopped. {_said(tail)}")
            time.sleep(POLL_S)
    finally:
        with undisturbed():
            _end(process, executor, name)
            reader.join(5.0)
    if process.returncode != 0:
        raise EngineError(f"{program} {exit_words(process.returncode)}. {_said(tail)}")


def exit_words(code: int) -> str:
    """How a program ended, in words."""
    if code < 0:
        return f"was ended by signal {-code} ({signal.Signals(-code).name})"
    return f"ended with exit code {code}"


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let no signal interrupt what must be done: a second request to stop would leave a container behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _end(process: subprocess.Popen[bytes], executor: Executor, name: str) -> None:
    if process.poll() is None:
        executor.end(name)
        end_tree(process, grace_s=GRACE_S)
        executor.end(name)  # the client may have been about to start it
    end_descendants()  # daemons of a program that has ended by itself


def _read(stream: IO[bytes], tail: deque[str], on_line: Callable[[str], None]) -> None:
    """Pass on what a program writes, line by line; progress bars redraw theirs with a carriage return."""
    rest = b""
    while chunk := os.read(stream.fileno(), 65536):
        sys.stderr.write(chunk.decode("utf-8", "replace"))
        sys.stderr.flush()
        *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
        rest = rest[-LINE_CHARS:]
        for line in lines:
            _line(line, tail, on_line)
    _line(rest, tail, on_line)


def _line(raw: bytes, tail: deque[str], on_line: Callable[[str], None]) -> None:
    text = "".join(c if c.isprintable() else " " for c in raw[:LINE_CHARS].decode("utf-8", "replace")).strip()
    if text:
        tail.append(text)
        on_line(text)


def _said(tail: Sequence[str]) -> str:
    text = " | ".join(tail)
    hint = next((f"{advice[0].upper()}{advice[1:]}. " for words, advice in HINTS.items() if words in text), "")
    return f"{hint}Last lines: {text or 'none'}"
