"""One model in its own process: `python -m backend.chat.model_process --model DIR --device cpu`.

Commands come as JSON lines on standard input, events leave as JSON lines on standard output.

    {"cmd": "generate", "id", "messages", "max_new_tokens", "temperature", "top_p", "seed"}
    {"cmd": "benchmark", "id", "prompt_tokens", "new_tokens", "seed"}
    {"cmd": "memory", "id"}
    {"cmd": "cancel", "id"}      ends the generation with this id, and any older one

Events: `ready` once, then per command `token` ..., and `done` or `error`; all but `ready` carry the id. An
error ends only its command. The process ends when its input ends, and with the thread that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import sys
import threading
import time
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, DataError, QuantdeckError
from backend.evaluate.loading import check_folder, import_for, open_model
from backend.evaluate.memory import peak_resident_bytes, reset_peak, resident_bytes
from backend.event_stream import EventWriter
from backend.process import die_with_parent


class Commands:
    """Standard input, read in the background so that a cancel is seen while tokens are made.

    Args:
        source: File descriptor to read lines from.
    """

    def __init__(self, source: int = 0) -> None:
        self._source = source
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue()
        self._cancelled = -1
        threading.Thread(target=self._read, name="commands", daemon=True).start()

    def next(self) -> dict[str, Any]:
        """The next command; waits for it."""
        return self._queue.get()

    def is_cancelled(self, request: int) -> bool:
        """Whether the request was cancelled."""
        return request <= self._cancelled

    def _read(self) -> None:
        try:
            with os.fdopen(self._source, encoding="utf-8", closefd=False) as lines:
                for line in lines:
                    command = json.loads(line)
                    if command["cmd"] == "cancel":
                        self._cancelled = max(self._cancelled, int(command["id"]))
                    else:
                        self._queue.put(command)
        except (ValueError, KeyError) as error:
            print(f"a command could not be read: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        # nobody is left to answer, and a forward pass may take minutes: leave without waiting for it
        os._exit(0)


class Server:
    """A loaded model and the commands it obeys.

    Args:
        model_dir: Folder of the model.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Compute dtype by name, None for the loader's default.
        events: Where events go.
        commands: Where commands come from.
    """

    def __init__(
        self, model_dir: Path, device: str, dtype: str | None, events: EventWriter, commands: Commands
    ) -> None:
        import torch

        from backend.chat.prompt import has_chat_template
        from backend.formats.decode_path import decode_path

        self._events = events
        self._commands = commands
        self._cuda = device.startswith("cuda")
        import_for(model_dir, device)
        self._idle = resident_bytes()
        reset_peak()
        started = time.perf_counter()
        self._model, self._tokenizer = open_model(model_dir, device, dtype)
        load_s = time.perf_counter() - started
        self._context = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self._load_peak = self._peak()
        self._reset_peak()
        events.send(
            {
                "event": "ready",
                "load_s": load_s,
                "context": self._context,
                "chat_template": has_chat_template(self._tokenizer),
                "device": device,
                "dtype": str(self._model.dtype).removeprefix("torch."),
                "decode_path": decode_path(self._model),
                "threads": torch.get_num_threads(),
                "device_name": torch.cuda.get_device_name(device) if self._cuda else None,
                "device_free_bytes": torch.cuda.mem_get_info(device)[0] if self._cuda else None,
            }
        )

    def run(self) -> None:
        """Obey commands until the input ends."""
        handlers = {"generate": self._generate, "benchmark": self._benchmark, "memory": self._memory}
        while True:
            command = self._commands.next()
            request = int(command["id"])
            try:
                handlers[command["cmd"]](request, command)
            except QuantdeckError as error:
                self._fail(request, error, error.message)
            except RuntimeError as error:
                # torch reports out of memory this way; the model itself is intact, so the process goes on
                self._fail(request, error, f"{type(error).__name__}: {error}")

    def _generate(self, request: int, command: dict[str, Any]) -> None:
        from backend.chat.decode import Sampler, generate, stop_token_ids
        from backend.chat.detokenize import IncrementalDecoder
        from backend.chat.prompt import encode_messages
        from backend.chat.stopping import StopText

        prompt = encode_messages(self._tokenizer, command["messages"])
        limit = int(command["max_new_tokens"])
        self._check_context(len(prompt.ids), limit)
        text = IncrementalDecoder(
            lambda ids: str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        )
        stop = StopText(prompt.stop)
        sampler = Sampler(float(command["temperature"]), float(command["top_p"]), int(command["seed"]))
        tokens, prefill_s, finish = 0, 0.0, "stop"
        started = first = time.perf_counter()
        for token in generate(
            self._model,
            prompt.ids,
            sampler,
            max_new_tokens=limit,
            stop_ids=stop_token_ids(self._model, self._tokenizer.eos_token_id),
            cancelled=lambda: self._commands.is_cancelled(request),
        ):
            now = time.perf_counter()
            if tokens == 0:
                first, prefill_s = now, now - started
            tokens += 1
            speed = (tokens - 1) / (now - first) if tokens > 1 else None
            new = stop.add(text.add(token))
            self._send("token", request, text=new, tokens=tokens, tokens_per_s=speed, prefill_s=prefill_s)
            if stop.found:
                break
        else:
            finish = "length" if tokens == limit else "stop"
        if self._commands.is_cancelled(request):
            finish = "cancelled"
        self._send(
            "done", request, text=stop.rest(), tokens=tokens, prompt_tokens=len(prompt.ids), prefill_s=prefill_s,
            finish=finish,
        )  # fmt: skip

    def _benchmark(self, request: int, command: dict[str, Any]) -> None:
        from backend.chat.decode import time_generation

        prompt_tokens, new_tokens = int(command["prompt_tokens"]), int(command["new_tokens"])
        self._check_context(prompt_tokens, new_tokens)
        timing = time_generation(
            self._model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, seed=int(command["seed"])
        )
        self._send("done", request, prefill_s=timing.prefill_s, decode_s=timing.decode_s)

    def _memory(self, request: int, command: dict[str, Any]) -> None:
        self._send("done", request, load_peak_bytes=self._load_peak, run_peak_bytes=self._peak())

    def _check_context(self, prompt_tokens: int, new_tokens: int) -> None:
        if self._context is not None and prompt_tokens + new_tokens > self._context:
            raise DataError(
                f"The prompt has {prompt_tokens} tokens and {new_tokens} more were asked for, but the model's context "
                f"is {self._context} tokens. Shorten the conversation or ask for fewer new tokens."
            )

    def _peak(self) -> int:
        """Peak memory in bytes: on CUDA what torch allocated, on CPU what came on top of the idle process."""
        if self._cuda:
            import torch

            return torch.cuda.max_memory_allocated(self._model.device)
        return max(0, peak_resident_bytes() - self._idle)

    def _reset_peak(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.reset_peak_memory_stats(self._model.device)
        else:
            reset_peak()

    def _send(self, event: str, request: int, **values: Any) -> None:
        self._events.send({"event": event, "id": request, **values})

    def _fail(self, request: int, error: Exception, message: str) -> None:
        self._send("error", request, kind=type(error).__name__, message=message)


def main(arguments: list[str] | None = None) -> int:
    """Load the model and serve until the input ends; returns the exit code of a failed start."""
    parser = argparse.ArgumentParser(prog="python -m backend.chat.model_process", description="Serve one model.")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--dtype", help="compute dtype: bfloat16, float16 or float32")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's choice if left out")
    parser.add_argument("--parent", type=int, help="process id of the starter, to end together with it")
    options = parser.parse_args(arguments)
    if options.parent is not None:
        die_with_parent(options.parent)
    events = EventWriter.claim_stdout()
    commands = Commands()
    try:
        check_folder(options.model, options.dtype)
        if options.threads is not None:
            if options.threads < 1:
                raise ConfigError(f"{options.threads} threads were asked for; at least 1 is needed.", key="threads")
            import torch

            torch.set_num_threads(options.threads)
        server = Server(options.model, options.device, options.dtype, events, commands)
    except QuantdeckError as error:
        events.error(error, error.message)
        return 1
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
