"""Talk to a model in a child process, without importing torch here."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from backend.errors import EngineError
from backend.formats import remote_code
from backend.paths import PROJECT
from backend.process import QUIET_THREADS

START_TIMEOUT_S = 1800.0
"""A model of tens of GB from a slow disk may take many minutes to load."""

# The child is killed when the thread that started it ends (PR_SET_PDEATHSIG counts threads, not processes), and
# a web server's threads come and go. So every child is started by this one thread, which lives as long as we do.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-starter")

State = dict[str, Any]


class ModelProcess:
    """A model in its own process.

        with ModelProcess(folder) as model:
            for state in model.generate([{"role": "user", "content": "Hello"}]):
                print(state["text"])

    One answer at a time; several threads may call `stop` and `close`.

    Args:
        model_dir: Folder of a 16-bit or quantized model.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Compute dtype by name, None for the loader's default.
        threads: CPU threads of the child, None for torch's choice.
        code_modules: Where the modules of the model's own code are copied to; None: it may not run such code.
    """

    def __init__(
        self,
        model_dir: str | Path,
        device: str = "cpu",
        *,
        dtype: str | None = None,
        threads: int | None = None,
        code_modules: Path | None = None,
    ) -> None:
        self.model_dir = Path(model_dir).expanduser().resolve()
        self.device = device
        self._code_modules = code_modules
        self.info: State = {}
        self._options = [*(["--dtype", dtype] if dtype else []), *(["--threads", str(threads)] if threads else [])]
        self._child: subprocess.Popen[str] | None = None
        self._events: queue.Queue[State | None] = queue.Queue()
        self._errors: IO[bytes] | None = None
        self._busy = threading.Lock()
        self._writing = threading.Lock()
        self._request = 0

    def __enter__(self) -> ModelProcess:
        self.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether the child is running."""
        return self._child is not None and self._child.poll() is None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> State:
        """Start the child and wait until the model is loaded; again after a crash, if it is not running.

        Returns:
            `{"load_s", "context": tokens or None, "chat_template": bool, "device", "dtype", "threads",
            "decode_path": how tokens are computed, in words, ...}`.

        Raises:
            EngineError: If the model cannot be loaded, with the reason, or not within `timeout_s` seconds.
        """
        if self.alive:
            return self.info
        self.close()
        self._events = queue.Queue()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  a file, not a pipe: nobody has to drain it
        self._child = _starter.submit(self._spawn).result()
        threading.Thread(target=_read_events, args=(self._child, self._events), daemon=True).start()
        try:
            event = self._events.get(timeout=timeout_s)
        except queue.Empty:
            self.close()
            raise EngineError(f"The model {self.model_dir} was not loaded within {timeout_s:g} s.") from None
        if event is None:
            raise self._crashed("while it was loading")
        if event.get("event") != "ready":
            self.close()
            raise EngineError(f"The model {self.model_dir} could not be loaded: {event.get('message')}")
        self.info = {key: value for key, value in event.items() if key != "event"}
        return self.info

    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[State]:
        """Answer a conversation, token by token.

        Args:
            messages: `{"role", "content"}`, oldest first.
            max_new_tokens: Upper bound of the answer's length.
            temperature: 0 for greedy.
            top_p: Nucleus, in (0, 1].
            seed: Fixes the random numbers; two models with one seed draw the same ones.

        Yields:
            `{"text": answer so far, "tokens", "tokens_per_s": decode speed or None, "prefill_s", "done": False}`
            and at the end the same with `"done": True`, `"prompt_tokens"` and `"finish"`: stop, length or
            cancelled. If the model refuses (context too long, template error): `{"error", "done": True, ...}`.
            Leaving the iterator early ends the answer.

        Raises:
            EngineError: If another answer is being made, the child is not running, or it dies.
        """
        state: State = {"text": "", "tokens": 0, "tokens_per_s": None, "prefill_s": None, "done": False}
        command = {
            "cmd": "generate",
            "messages": [dict(message) for message in messages],
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
        }
        for event in self._ask(command):
            kind = event["event"]
            if kind == "error":
                yield {**state, "error": event["message"], "kind": event["kind"], "done": True}
                return
            text = state["text"] + event.pop("text", "")
            values = {key: value for key, value in event.items() if key not in ("event", "id")}
            state = {**state, **values, "text": text, "done": kind == "done"}
            yield dict(state)

    def benchmark(self, prompt_tokens: int, new_tokens: int, seed: int = 0) -> State:
        """Time one prefill and one greedy decode.

        Returns:
            `{"prefill_s", "decode_s"}` in wall seconds.

        Raises:
            EngineError: If the child fails or refuses.
        """
        command = {"cmd": "benchmark", "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "seed": seed}
        return self._answer(command)

    def memory(self) -> State:
        """Peak memory of loading and since then, above the idle process: `{"load_peak_bytes", "run_peak_bytes"}`."""
        return self._answer({"cmd": "memory"})

    def stop(self) -> None:
        """End the answer that is being made; its iterator then ends with `finish: cancelled`."""
        if self.alive:
            self._write({"cmd": "cancel", "id": self._request})

    def close(self, timeout_s: float = 5.0) -> None:
        """End the child; does nothing if there is none."""
        child, self._child = self._child, None
        if child is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()  # type: ignore[union-attr]  # a pipe by construction; its end ends the child
            try:
                child.wait(timeout_s)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if self._errors is not None:
            self._errors.close()
            self._errors = None

    def _spawn(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [
                *(sys.executable, "-m", "backend.chat.model_process", "--model", str(self.model_dir)),
                *("--device", self.device, "--parent", str(os.getpid()), *self._options),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=PROJECT,
            env=remote_code.environment({**os.environ, **QUIET_THREADS}, self._code_modules),
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C in the terminal is for us; the child ends with our end of the pipe
        )

    def _ask(self, command: State) -> Iterator[State]:
        """Send a command; yields its events up to `done` or `error`."""
        if not self._busy.acquire(blocking=False):
            raise EngineError(f"The model {self.model_dir.name} is still answering; stop it first.")
        finished = False
        try:
            if not self.alive:
                raise self._crashed("before it was asked") if self._child else EngineError("The model is not started.")
            self._request += 1
            request = self._request
            self._write({**command, "id": request})
            while not finished:
                event = self._events.get()
                if event is None:
                    self._events.put(None)  # whoever asks next must see it too
                    finished = True
                    raise self._crashed("while it was answering")
                if event.get("id") == request:  # else: late events of an answer that was left early
                    finished = event["event"] in ("done", "error")
                    yield event
        finally:
            if not finished:
                self.stop()
            self._busy.release()

    def _answer(self, command: State) -> State:
        """Send a command that has one answer.

        Raises:
            EngineError: If the answer is an error.
        """
        (event,) = self._ask(command)
        if event["event"] == "error":
            raise EngineError(f"{self.model_dir.name}: {event['message']}")
        return {key: value for key, value in event.items() if key not in ("event", "id")}

    def _write(self, command: State) -> None:
        child = self._child
        if child is None or child.stdin is None:
            return
        with self._writing, contextlib.suppress(BrokenPipeError):  # its death is noticed where events are read
            child.stdin.write(json.dumps(command) + "\n")
            child.stdin.flush()

    def _crashed(self, when: str) -> EngineError:
        """The error for a child that is gone: exit code and the end of its error output."""
        child, errors = self._child, self._errors
        if child is None or errors is None:
            return EngineError(f"The model {self.model_dir} was unloaded {when}.")
        code = child.wait()
        tail = ""
        with contextlib.suppress(ValueError):  # closed by another thread just now
            end = errors.seek(0, os.SEEK_END)
            errors.seek(max(0, end - 2000))
            tail = errors.read().decode("utf-8", "replace").strip()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        hint = " (9 is also how the kernel ends a process when memory runs out)" if code == -9 else ""
        return EngineError(
            f"The process of model {self.model_dir} {how}{hint} {when}. Start it again. End of its error output:\n"
            f"{tail or '(empty)'}"
        )


def _read_events(child: subprocess.Popen[str], events: queue.Queue[State | None]) -> None:
    """Put a child's events into a queue, None at the end."""
    if child.stdout is not None:
        with child.stdout as lines:
            for line in lines:
                events.put(json.loads(line))
    events.put(None)
