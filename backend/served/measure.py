"""How fast a served model is: time to the first token, decode at batch 1, output at several requests at once.

Prompts are random words, different for every request, so that no cache of prefixes shortens them; their number is
found by asking the server how many tokens some words are. All token counts are the server's (`usage`). What is timed
includes the network and the server's queue: run it beside the server, and while nobody else uses it.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import httpx

from backend.errors import ConfigError, EngineError
from backend.evaluate.metrics import Metric, versions
from backend.evaluate.stats import median_interval
from backend.served.completion import complete, sampling
from backend.served.transport import Limits, new_client

WORDS = (
    "apple", "bridge", "cloud", "dance", "earth", "field", "garden", "house", "island",
    "jump", "kitchen", "light", "moon", "night", "ocean", "paper", "queen", "river",
    "stone", "table", "under", "voice", "water", "yellow", "animal", "bread", "chair",
    "dream", "engine", "fire", "glass", "hand", "iron", "journey", "king", "letter",
)  # fmt: skip
PROBE_WORDS = 64


@dataclass(frozen=True)
class ServedSpeed:
    """How a served model is measured.

    Attributes:
        prompt_tokens: Wanted length of each prompt.
        new_tokens: Tokens to make per request.
        warmup: Repetitions that are thrown away.
        repetitions: Repetitions that count.
        concurrency: Requests at once in the second half of each repetition; 1 leaves it out.
        seed: Fixes the prompts.
    """

    prompt_tokens: int = 128
    new_tokens: int = 64
    warmup: int = 2
    repetitions: int = 7
    concurrency: int = 8
    seed: int = 0

    def check(self) -> None:
        """Refuse what measures nothing or takes for ever.

        Raises:
            ConfigError: If a count is too small or too large.
        """
        bounds = {
            "prompt_tokens": (1, 1_000_000), "new_tokens": (2, 100_000), "warmup": (0, 1000),
            "repetitions": (3, 10_000), "concurrency": (1, 1024),
        }  # fmt: skip
        for key, (least, most) in bounds.items():
            value = getattr(self, key)
            if not least <= value <= most:
                raise ConfigError(f"found {value}; it must be from {least} to {most}.", key=key, value=value)


@dataclass(frozen=True)
class Timing:
    """One request: seconds of `time.perf_counter`, and tokens by the server's account."""

    sent: float
    first: float
    last: float
    prompt_tokens: int
    new_tokens: int


def measure_served(
    url: str,
    model: str,
    settings: ServedSpeed,
    *,
    limits: Limits | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Metric]:
    """Measure one model of a server.

    Args:
        url: Base URL, one that the operator allows.
        model: Its id there.
        settings: How.
        limits: Of each answer.
        on_progress: Called with repetitions done and in all.

    Returns:
        Medians over the repetitions, each with its interval and samples: time to the first token in seconds, decode
        tokens/s of one request ((tokens - 1) / (last - first)); with several at once, all output tokens per wall
        second from the first request sent to the last token, and the median time to the first token.

    Raises:
        ConfigError: If a setting is out of bounds.
        EngineError: If the server cannot be reached, refuses, breaks off, counts no tokens, or does not stream.
    """
    settings.check()
    limits = limits or Limits()
    alone: list[Timing] = []
    rounds: list[list[Timing]] = []

    async def run() -> None:
        rng = random.Random(settings.seed)
        async with new_client(limits) as client:

            async def one(words: int) -> Timing:
                prompt = " ".join(rng.choices(WORDS, k=words))
                return await _timed(client, url, model, prompt, settings.new_tokens, limits)

            words = max(1, round(PROBE_WORDS * settings.prompt_tokens / (await one(PROBE_WORDS)).prompt_tokens))
            for repetition in range(settings.warmup + settings.repetitions):
                single = await one(words)
                several = (
                    await _together([one(words) for _ in range(settings.concurrency)])
                    if settings.concurrency > 1
                    else []
                )
                if repetition >= settings.warmup:
                    alone.append(single)
                    rounds.append(several)
                if on_progress:
                    on_progress(repetition + 1, settings.warmup + settings.repetitions)

    asyncio.run(run())
    return _metrics(url, model, settings, alone, rounds)


async def _together(requests: Sequence[Any]) -> list[Timing]:
    """All results, or the first error; the others are ended then."""
    tasks = [asyncio.ensure_future(request) for request in requests]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _timed(
    client: httpx.AsyncClient, url: str, model: str, prompt: str, new_tokens: int, limits: Limits
) -> Timing:
    # without ignore_eos the length of the answer, and so the speed, would depend on what the model happens to say
    options = {**sampling(new_tokens), "ignore_eos": True}
    sent = time.perf_counter()
    first = last = 0.0
    parts = texts = 0
    prompt_count = count = None
    async for piece in complete(client, url, model, prompt, options, limits):
        if piece.begun:
            first, last = first or piece.at, piece.at
            parts, texts = parts + 1, texts + bool(piece.text)
        prompt_count = piece.prompt_tokens if piece.prompt_tokens is not None else prompt_count
        count = piece.new_tokens if piece.new_tokens is not None else count
    if not prompt_count or count is None:
        raise EngineError(
            f"{url} does not say how many tokens it read and made (`usage` with stream_options include_usage), and "
            "they are not guessed here; it cannot be measured."
        )
    # how many tokens the first part holds is not told: with few parts, taking it for one would flatter the speed
    if count < 2 or texts < 2 or 2 * parts < count or last <= first:
        raise EngineError(
            f"{url} sent an answer of {count} tokens in {texts} part(s); decoding cannot be timed from that. It has to "
            "stream token by token."
        )
    return Timing(sent, first, last, prompt_count, count)


def _metrics(
    url: str, model: str, settings: ServedSpeed, alone: list[Timing], rounds: list[list[Timing]]
) -> list[Metric]:
    everyone = [*alone, *(timing for several in rounds for timing in several)]
    prompt, made = (_range([getattr(timing, key) for timing in everyone]) for key in ("prompt_tokens", "new_tokens"))
    protocol = {
        "name": "served speed", "url": url, "model": model, "prompt_tokens": prompt, "new_tokens": made,
        "warmup": settings.warmup, "repetitions": settings.repetitions, "temperature": 0, "seed": settings.seed,
        "statistic": "median", "versions": versions("httpx"),
    }  # fmt: skip
    how = (
        f"{prompt} tokens of random words, {made} new ones, greedy, by the server's own counts; median of "
        f"{settings.repetitions} repetitions after {settings.warmup}; streamed over HTTP from {url}, {model}"
    )

    def metric(kind: str, name: str, unit: str, values: list[float], at_once: int) -> Metric:
        low, high, confidence = median_interval(values)
        return Metric(
            metric=kind,
            name=name,
            value=median(values),
            stderr=None,
            unit=unit,
            higher_is_better=unit == "tokens/s",
            protocol=protocol | {"concurrency": at_once, "summary": f"{at_once} at once; {how}"},
            samples=values,
            spread={"low": low, "high": high, "confidence": confidence},
        )

    found = [
        metric("time to first token", "Time to first token", "s", [t.first - t.sent for t in alone], 1),
        metric(
            "tokens/s", "Decode", "tokens/s", [(t.new_tokens - 1) / (t.last - t.first) for t in alone], 1
        ),
    ]  # fmt: skip
    if settings.concurrency > 1:
        waits = [median([t.first - t.sent for t in several]) for several in rounds]
        output = [
            sum(t.new_tokens for t in several) / (max(t.last for t in several) - min(t.sent for t in several))
            for several in rounds
        ]
        n = settings.concurrency
        found += [
            metric("time to first token", f"Time to first token, {n} requests at once", "s", waits, n),
            metric("tokens/s", f"Output of {n} requests at once", "tokens/s", output, n),
        ]
    return found


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
