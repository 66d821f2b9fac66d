"""A served model as the chat takes it: the interface of a model in a process of its own, over HTTP."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Any

from backend.chat.answering import State
from backend.errors import EngineError
from backend.served.bridge import Stream
from backend.served.completion import Piece, chat, models_of, sampling
from backend.served.transport import BRIEF, Limits, new_client


def list_models(url: str, limits: Limits = BRIEF) -> tuple[str, ...]:
    """Ids of the models that a server offers.

    Args:
        url: Base URL, one that the operator allows.
        limits: How long to wait.

    Raises:
        EngineError: If it cannot be reached, with what to start; or if it is no model server.
    """

    async def ask() -> tuple[str, ...]:
        async with new_client(limits) as client:
            return await models_of(client, url, limits)

    return asyncio.run(ask())


def served_name(url: str, model: str) -> str:
    """Which of a server's models is meant.

    Raises:
        EngineError: If the server does not serve `model`, or serves several and `model` is empty.
    """
    found = list_models(url)
    if model in found or (not model and len(found) == 1):
        return model or found[0]
    asked = f"does not serve {model!r}" if model else "serves several models and none was named"
    raise EngineError(f"{url} {asked}; it has {', '.join(found)}.")


class ServedModel:
    """One model of a server; one answer at a time, several threads may call `stop` and `close`.

    Args:
        url: Base URL, one that the operator allows.
        model: Its id there; empty for the only one.
        limits: Of an answer.
    """

    def __init__(self, url: str, model: str = "", limits: Limits | None = None) -> None:
        self.url, self.model = url, model
        self.info: State = {}
        self._limits = limits or Limits()
        self._busy = threading.Lock()
        self._stream: Stream[Piece] | None = None

    @property
    def alive(self) -> bool:
        """Whether the server has been found to serve the model; whether it still does shows when it is asked."""
        return bool(self.info)

    def start(self) -> State:
        """Ask whether the server is there and serves the model; `{"served": url, "model", "decode_path": in words}`.

        Raises:
            EngineError: If it is not, or does not.
        """
        if not self.info:
            self.model = served_name(self.url, self.model)
            path = f"{self.model} served by {self.url}"
            self.info = {"served": self.url, "model": self.model, "decode_path": path}
        return self.info

    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[State]:
        """Answer a conversation; arguments and states as in `backend.chat.client.ModelProcess.generate`.

        `tokens` is 0 and `tokens_per_s` None until the server has told the count, which most do at the end; without one
        they stay so. `prefill_s` is the time to the first text, network and queue included.

        Raises:
            EngineError: If another answer is being made, or the server cannot be reached, refuses or breaks off.
        """
        if not self._busy.acquire(blocking=False):
            raise EngineError(f"{self.model} at {self.url} is still answering; stop it first.")
        options = sampling(max_new_tokens, temperature, top_p, seed)
        started = time.perf_counter()
        stream = self._stream = Stream(self._pieces(messages, options))
        state: State = {"text": "", "tokens": 0, "tokens_per_s": None, "prefill_s": None, "done": False}
        finish, first, last, prompt = "stop", 0.0, 0.0, None
        try:
            for piece in stream:
                if piece.begun:
                    first, last = first or piece.at, piece.at
                finish, prompt = piece.finish or finish, piece.prompt_tokens or prompt
                tokens = state["tokens"] if piece.new_tokens is None else piece.new_tokens
                speed = (tokens - 1) / (last - first) if tokens > 1 and last > first else None
                waited = first - started if first else None
                state = {"text": state["text"] + piece.text, "tokens": tokens, "tokens_per_s": speed}
                state |= {"prefill_s": waited, "done": False}
                yield dict(state)
            finish = "cancelled" if stream.cancelled else finish
            yield {**state, "prompt_tokens": prompt, "finish": finish, "done": True}
        finally:
            stream.cancel()
            self._stream = None
            self._busy.release()

    def stop(self) -> None:
        """End the answer that is being made, at the server too; its iterator then ends with `finish: cancelled`."""
        if stream := self._stream:
            stream.cancel()

    def memory(self) -> State:
        """Nothing: the protocol does not tell a server's memory."""
        return {}

    def close(self) -> None:
        """End the answer that is being made and forget the server; the server itself goes on."""
        self.stop()
        self.info = {}

    async def _pieces(self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]) -> AsyncIterator[Piece]:
        async with new_client(self._limits) as client:
            async for piece in chat(client, self.url, self.model, messages, options, self._limits):
                yield piece
