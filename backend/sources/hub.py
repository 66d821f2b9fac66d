"""Asking the Hub what models there are and what one of them is, without downloading it.

Each question is answered by a program of its own (`backend.sources.hub_worker`) within a time limit. Answers are kept
for a while, so that a page that asks again costs nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from backend.engines.environments import own_variables
from backend.errors import ConfigError, ModelError, QuantdeckError
from backend.formats.headers import TensorInfo
from backend.paths import PROJECT, Home
from backend.schema.job import is_revision
from backend.sources import hub_token
from backend.sources.hub_errors import WORKS_OFFLINE, HubUnreachable
from backend.sources.models import ModelFacts, is_repo_id
from backend.sources.quick_check import QuickFacts, check_tensors

SEARCH_LIMIT_S, INSPECT_LIMIT_S = 20.0, 40.0
KEPT_S, FAILURE_KEPT_S = 600.0, 20.0
INSPECTION_KEPT_S = 3600.0  # while somebody fills a form
MOST_KEPT = 200
MOST_RESULTS = 20
SHORTEST_SEARCH, LONGEST_SEARCH = 2, 100
_turns = threading.BoundedSemaphore(3)  # programs at once, whatever pages ask for
TURN_WAIT_S = 10.0


@dataclass(frozen=True)
class HubModel:
    """A model in a list of the Hub. What the Hub does not tell is None.

    Attributes:
        id: Value for `MODEL`.
        downloads: Downloads in the last 30 days.
        likes: How many people like it.
        gated: Whether its licence has to be accepted on its page first.
        licence: Name of its licence, as its page gives it.
        parameters: Number of its weights.
        updated: Day of its last change, ISO 8601.
        kind: What it is for, in the Hub's words, e.g. `text-generation`.
        architecture: Name of the transformers class.
        refused: Why it cannot be quantized, as far as that is known.
    """

    id: str
    downloads: int | None
    likes: int | None
    gated: bool
    licence: str | None
    parameters: int | None
    updated: str | None
    kind: str | None
    architecture: str | None
    refused: str | None


@dataclass(frozen=True)
class Inspected:
    """One model on the Hub, looked at.

    Attributes:
        model: What a list tells of it; `refused` is None if it can be quantized.
        commit: What the asked revision stands for now.
        facts: From its config.json and headers; None if they could not be read.
        quick: What checks and forecasts ask of a model; None if it cannot be quantized, or its headers are too long
            to be kept.
        download_bytes: Of the files that a job downloads; None where the Hub does not tell.
        pickle: Whether its weights are stored as pickle alone.
    """

    model: HubModel
    commit: str
    facts: ModelFacts | None
    quick: QuickFacts | None = None
    download_bytes: int | None = None
    pickle: bool = False


class _Kept:
    """Answers for a while, the oldest forgotten first."""

    def __init__(self) -> None:
        self._answers: OrderedDict[tuple[Any, ...], tuple[float, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[Any, ...]) -> Any:
        with self._lock:
            until, answer = self._answers.get(key, (0.0, None))
            return answer if time.monotonic() < until else None

    def put(self, key: tuple[Any, ...], answer: Any, kept_s: float) -> None:
        with self._lock:
            self._answers[key] = (time.monotonic() + kept_s, answer)
            self._answers.move_to_end(key)
            while len(self._answers) > MOST_KEPT:
                self._answers.popitem(last=False)


_kept = _Kept()


def search(home: Home, text: str) -> list[HubModel]:
    """Text-generation models on the Hub whose name holds the given words, the most downloaded first.

    Raises:
        ConfigError: If the text can be part of no model's name.
        ModelError: If the Hub cannot be asked, or does not answer as it should.
    """
    text = " ".join(text.lower().split())  # the Hub does not tell them apart either
    good = all(c.isascii() and (c.isalnum() or c in " ._/-") for c in text) and ".." not in text
    if not SHORTEST_SEARCH <= len(text) <= LONGEST_SEARCH or not good:
        raise ConfigError(
            f"give {SHORTEST_SEARCH} to {LONGEST_SEARCH} letters, digits, '.', '_', '-' or '/' of a model's name",
            key="search",
        )
    found: list[HubModel] = _ask(home, {"ask": "search", "text": text, "limit": MOST_RESULTS}, SEARCH_LIMIT_S, _found)
    return found


def inspect(home: Home, repo_id: str, revision: str | None = None) -> Inspected:
    """What one model on the Hub is, and whether it can be quantized; reads no weights.

    Args:
        home: Its token is used.
        repo_id: The model.
        revision: Branch, tag or commit; None for the newest of the main branch.

    Raises:
        ConfigError: If the name or the revision can be none.
        ModelError: If there is no such model, it is closed to us, or the Hub cannot be asked; the message says which.
    """
    found: Inspected = _ask(home, _inspection(repo_id, revision), INSPECT_LIMIT_S, _inspected)
    return found


def peek(home: Home, repo_id: str, revision: str | None = None) -> Inspected | None:
    """What `inspect` found a short while ago; None if nothing is known. Asks nobody."""
    try:
        found = _kept.get(_key(home, _inspection(repo_id, revision)))
    except QuantdeckError:
        return None
    return found if isinstance(found, Inspected) else None


def _inspected(answer: dict[str, Any]) -> Inspected:
    """The program's answer, in our terms."""
    facts = ModelFacts(**answer["facts"]) if answer["facts"] else None
    model = HubModel(**{key: answer[key] for key in HubModel.__dataclass_fields__ if key in answer} | {
        "architecture": answer.get("architecture")
    })  # fmt: skip
    quick = None
    if answer["tensors"] is not None:
        tensors = [TensorInfo(name, dtype, tuple(shape), *rest) for name, dtype, shape, *rest in answer["tensors"]]
        quick = check_tensors(model.id, answer["config"], tensors)
    return Inspected(model, answer["commit"], facts, quick, answer["download_bytes"], answer["pickle"])


def _found(answer: dict[str, Any]) -> list[HubModel]:
    return [HubModel(**row) for row in answer["models"] if is_repo_id(row["id"])]


def known(home: Home, repo_id: str, revision: str | None = None) -> bool:
    """Whether `inspect` would answer at once, with what it found a short while ago."""
    try:
        return _kept.get(_key(home, _inspection(repo_id, revision))) is not None
    except QuantdeckError:
        return True  # the error is told at once


def _inspection(repo_id: str, revision: str | None) -> dict[str, Any]:
    if not is_repo_id(repo_id):
        raise ConfigError(f"found {repo_id!r}, which is no Hub id like 'organisation/name'", key="MODEL", value=repo_id)
    if revision is not None and not is_revision(revision):
        raise ConfigError(f"found {revision!r}, which is no branch, tag or commit", key="REVISION", value=revision)
    return {"ask": "inspect", "id": repo_id, "revision": revision}


def _key(home: Home, question: dict[str, Any]) -> tuple[Any, ...]:
    """Answers differ by home, by its token, and by where the Hub is."""
    try:
        stamp = hub_token.token_file(home).stat().st_mtime_ns
    except OSError:
        stamp = 0
    settings = tuple(os.environ.get(name) for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE"))
    return (str(home.root), stamp, *settings, *sorted(question.items(), key=str))


def _ask(home: Home, question: dict[str, Any], limit_s: float, read: Callable[[dict[str, Any]], Any]) -> Any:
    """The answer to a question in our terms, or the error that it is; kept for a while."""
    key = _key(home, question)
    answer = _kept.get(key)
    if answer is None:
        told = _answer(home, question, limit_s)
        failed = "error" in told
        answer = told if failed else read(told)
        kept_s = INSPECTION_KEPT_S if question["ask"] == "inspect" else KEPT_S
        _kept.put(key, answer, FAILURE_KEPT_S if failed else kept_s)
    if isinstance(answer, dict):
        raise (HubUnreachable if answer["unreachable"] else ModelError)(answer["error"])
    return answer


def _answer(home: Home, question: dict[str, Any], limit_s: float) -> dict[str, Any]:
    what = question.get("id", "the search")
    if not _turns.acquire(timeout=TURN_WAIT_S):
        raise HubUnreachable(f"MODEL: {what}: several questions to the Hub are not answered yet; try again in a moment")
    try:
        with tempfile.TemporaryDirectory(prefix="quantdeck-hub-") as cache:
            done = subprocess.run(
                [sys.executable, "-m", "backend.sources.hub_worker"], input=json.dumps(question), timeout=limit_s,
                cwd=PROJECT, env=_environment(home, cache), capture_output=True, text=True, check=False,
            )  # fmt: skip
        answer = json.loads(done.stdout)
        if not isinstance(answer, dict):
            raise ValueError("no object")
    except subprocess.TimeoutExpired:
        told = f"MODEL: {what}: the Hub did not answer within {limit_s:.0f} s; check the network. {WORKS_OFFLINE}"
        return {"error": told, "unreachable": True}
    except (OSError, ValueError):
        told = f"MODEL: {what}: the program that asks the Hub ended without an answer; try again"
        return {"error": told, "unreachable": True}
    finally:
        _turns.release()
    return answer


def _environment(home: Home, cache: str) -> dict[str, str]:
    return {
        **own_variables(hub_token=True),
        **hub_token.variables(hub_token.token_file(home)),
        "HF_HUB_CACHE": cache,  # what is fetched to be looked at is no download to keep
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
