"""One HTTP answer of a model server, read within limits: a JSON object, or a stream of server-sent events.

A server is not trusted. Redirects are not followed, nothing of the environment (proxies, `.netrc`) is used, packed
answers are refused, and every answer is limited in time, in bytes and in the length of its lines.

Source of the event format: HTML Living Standard, section 9.2 (server-sent events), of which model servers use `data:`
lines alone; the last one is `data: [DONE]`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from backend.errors import EngineError

SHOWN = 500  # characters of a server's message


@dataclass(frozen=True)
class Limits:
    """How long and how large an answer may be.

    Attributes:
        connect_s: Seconds to reach the server.
        silence_s: Seconds without a byte.
        total_s: Seconds for the whole answer.
        line_bytes: Longest line of a stream.
        answer_bytes: The whole answer.
    """

    connect_s: float = 3.0
    silence_s: float = 120.0
    total_s: float = 1800.0
    line_bytes: int = 1024**2
    answer_bytes: int = 64 * 1024**2


BRIEF = Limits(connect_s=2.0, silence_s=3.0, total_s=5.0, answer_bytes=4 * 1024**2)
"""For the list of models, which a page waits for."""


def new_client(limits: Limits) -> httpx.AsyncClient:
    """A client that goes where it is sent and nowhere else."""
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=httpx.Timeout(limits.silence_s, connect=limits.connect_s, pool=limits.total_s),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        headers={"accept-encoding": "identity", "user-agent": "quantdeck"},
    )


async def get_json(client: httpx.AsyncClient, base: str, path: str, limits: Limits) -> Any:
    """What a server answers to GET, parsed.

    Raises:
        EngineError: If it cannot be reached, refuses, is too slow or too large, or sends no JSON.
    """
    async with _told(base, limits), client.stream("GET", base + path, headers={"accept": "application/json"}) as answer:
        await _check(answer, base, limits, "application/json")
        return _parsed(await _body(answer, base, limits.answer_bytes), base)


async def post_events(
    client: httpx.AsyncClient, base: str, path: str, payload: Mapping[str, Any], limits: Limits
) -> AsyncIterator[dict[str, Any]]:
    """The events of a streamed answer to POST, up to `[DONE]`.

    Raises:
        EngineError: As `get_json`; also if the stream ends before `[DONE]`, or the server reports an error in it.
    """
    headers = {"accept": "text/event-stream"}
    async with _told(base, limits), client.stream("POST", base + path, json=payload, headers=headers) as answer:
        await _check(answer, base, limits, "text/event-stream")
        async for line in _lines(answer, base, limits):
            if not line.startswith(b"data:"):
                continue  # comments, which keep a connection alive, and names of events
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = _parsed(data, base)
            if not isinstance(event, dict):
                raise EngineError(f"{base} sent an event that is no object; it is no OpenAI-compatible server.")
            if "error" in event or event.get("object") == "error":
                raise EngineError(f"{base} broke off its answer: {_message(event) or 'no reason given'}")
            yield event
    raise EngineError(f"{base} ended its answer without [DONE]: it stopped in the middle. See the server's own log.")


@asynccontextmanager
async def _told(base: str, limits: Limits) -> AsyncIterator[None]:
    """What can go wrong on the way, in words."""
    try:
        async with asyncio.timeout(limits.total_s):
            yield
    except TimeoutError:
        raise EngineError(f"{base} did not finish its answer within {limits.total_s:g} s.") from None
    except (httpx.ConnectError, httpx.ConnectTimeout):
        raise EngineError(
            f"Nothing answers at {base}. Start a model server there, for instance `trtllm-serve MODEL --host 127.0.0.1 "
            "--port 8000`, or name the right address in `urls` of [served] in quantdeck.toml."
        ) from None
    except httpx.TimeoutException:
        raise EngineError(
            f"{base} was silent for {limits.silence_s:g} s. It may still load its model, or be busy; see its own log."
        ) from None
    except httpx.HTTPError as error:
        raise EngineError(f"The answer of {base} broke off or is no HTTP ({type(error).__name__}: {error}).") from None


async def _check(answer: httpx.Response, base: str, limits: Limits, wanted: str) -> None:
    status = answer.status_code
    if 300 <= status < 400:
        target = answer.headers.get("location", "nowhere")[:SHOWN]
        raise EngineError(f"{base} redirects to {target}, which is not followed; allow the final address instead.")
    kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
    if status != 200:
        said = ""
        if kind == "application/json":
            try:
                said = _message(json.loads(await _body(answer, base, limits.line_bytes)))
            except (ValueError, RecursionError):
                said = ""
        key = " It asks for a key; servers that do are not supported." if status == 401 else ""
        raise EngineError(f"{base} answers {status} ({answer.reason_phrase}): {said or 'no message'}.{key}")
    if kind != wanted:
        raise EngineError(f"{base} is no OpenAI-compatible server: it sent {kind or 'no type'} instead of {wanted}.")
    if answer.headers.get("content-encoding", "identity") != "identity":
        raise EngineError(f"{base} packs its answer ({answer.headers['content-encoding']}) although it may not.")


async def _body(answer: httpx.Response, base: str, most: int) -> bytes:
    found = bytearray()
    async for part in answer.aiter_raw():
        found += part
        if len(found) > most:
            raise EngineError(f"The answer of {base} has more than {most} bytes; it is no OpenAI-compatible server.")
    return bytes(found)


async def _lines(answer: httpx.Response, base: str, limits: Limits) -> AsyncIterator[bytes]:
    """Complete lines, without their ends."""
    rest, seen = bytearray(), 0
    async for part in answer.aiter_raw():
        seen += len(part)
        *lines, last = part.split(b"\n")
        for line in lines:
            yield bytes(rest + line).rstrip(b"\r")
            rest.clear()
        rest += last
        if seen > limits.answer_bytes or len(rest) > limits.line_bytes:
            raise EngineError(
                f"{base} sent a line of more than {limits.line_bytes} or an answer of more than {limits.answer_bytes} "
                "bytes; it is no OpenAI-compatible server."
            )


def _parsed(data: bytes, base: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        start = data[:80].decode("utf-8", "replace")
        raise EngineError(f"{base} sent no valid JSON (it begins {start!r}); it is no model server.") from None


def _message(found: Any) -> str:
    """A server's message: `{"error": {"message"}}`, `{"error": text}`, `{"message"}` or `{"detail"}`."""
    for _ in range(2):
        if isinstance(found, dict):
            found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), "")
    return str(found)[:SHOWN].rstrip(".") if found else ""
