"""Text as a server makes it: the OpenAI protocol's chat and plain completions, streamed.

Token counts are the server's own (`usage`, asked for by `stream_options`). Nothing is counted here: a piece of the
stream may carry any number of tokens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from backend.errors import EngineError
from backend.served.transport import Limits, get_json, post_events

MOST_MODELS = 100
MOST_NAME = 300  # characters


@dataclass(frozen=True)
class Piece:
    """One event of an answer.

    Attributes:
        at: `time.perf_counter` when it came.
        text: New text, maybe none.
        begun: Whether it carries a part of the answer, rather than its frame (role, usage). In a plain completion a
            part may have no text: a special token, or half a character.
        finish: Why the answer ended (`stop`, `length`), None before.
        prompt_tokens: Of the whole request, by the server's account; None if this piece has none.
        new_tokens: Of the answer so far, likewise.
    """

    at: float
    text: str = ""
    begun: bool = False
    finish: str | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None


async def models_of(client: httpx.AsyncClient, base: str, limits: Limits) -> tuple[str, ...]:
    """Ids of the models that a server offers.

    Raises:
        EngineError: If it cannot be reached, or what answers there is no model server, or serves nothing.
    """
    found = await get_json(client, base, "/v1/models", limits)
    rows = found.get("data") if isinstance(found, dict) else None
    if not isinstance(rows, list):
        raise EngineError(f"{base} is no OpenAI-compatible server: its /v1/models has no list `data`.")
    names = [row.get("id") for row in rows[:MOST_MODELS] if isinstance(row, dict)]
    good = tuple(name for name in names if isinstance(name, str) and 0 < len(name) <= MOST_NAME and name.isprintable())
    if not good:
        raise EngineError(f"{base} serves no model.")
    return good


def sampling(
    max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> dict[str, int | float]:
    """Sampling settings under the protocol's names."""
    return {"max_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}


async def chat(
    client: httpx.AsyncClient,
    base: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    limits: Limits,
) -> AsyncIterator[Piece]:
    """Answer a conversation; the server applies its model's chat template.

    Raises:
        EngineError: See `transport.post_events`.
    """
    payload = {"model": model, "messages": [dict(message) for message in messages], **options, **_STREAMED}
    async for event in post_events(client, base, "/v1/chat/completions", payload, limits):
        piece = _piece(event, base, lambda choice: (choice.get("delta") or {}).get("content"))
        yield replace(piece, begun=bool(piece.text))


async def complete(
    client: httpx.AsyncClient, base: str, model: str, prompt: str, options: Mapping[str, Any], limits: Limits
) -> AsyncIterator[Piece]:
    """Continue a text.

    Raises:
        EngineError: See `transport.post_events`.
    """
    payload = {"model": model, "prompt": prompt, **options, **_STREAMED}
    async for event in post_events(client, base, "/v1/completions", payload, limits):
        yield _piece(event, base, lambda choice: choice.get("text"))


_STREAMED = {"stream": True, "stream_options": {"include_usage": True}}


def _piece(event: Mapping[str, Any], base: str, text_of: Any) -> Piece:
    at = time.perf_counter()
    usage = event.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    counts = {"prompt_tokens": _count(usage.get("prompt_tokens")), "new_tokens": _count(usage.get("completion_tokens"))}
    choices = event.get("choices")
    try:
        choice = choices[0] if choices else {}
        text, finish = text_of(choice), choice.get("finish_reason")
    except (AttributeError, KeyError, TypeError):
        raise EngineError(f"{base} sent an event without valid `choices`; it is no OpenAI-compatible server.") from None
    text = text if isinstance(text, str) else ""
    return Piece(at, text, bool(choices), finish if isinstance(finish, str) else None, **counts)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
