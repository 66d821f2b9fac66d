"""The shape of one measured number, and what every protocol states about the machine and the software."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NotRequired, TypedDict

from backend.errors import QuantdeckError


class Metric(TypedDict):
    """One number of one model.

    Attributes:
        metric: Kind: perplexity, accuracy, size, tokens/s, peak memory, or lm_eval's own metric name.
        name: What people read, e.g. `Perplexity (wikitext-2-raw-v1:test, gptq)`.
        value: The number, in `unit`.
        stderr: Standard error in `unit`, or None where none is defined.
        unit: `%`, `tokens/s`, `bytes` or empty.
        higher_is_better: Direction of improvement.
        protocol: Everything that must be equal before two values may be compared; `summary` is its one-line form.
        samples: Per-window NLL (nats/token), per-question score (0 to 1) or per-repetition value, in a fixed order.
        spread: Of a median: `{"low", "high", "confidence"}` from order statistics.
    """

    metric: str
    name: str
    value: float
    stderr: float | None
    unit: str
    higher_is_better: bool
    protocol: dict[str, Any]
    samples: list[float]
    spread: NotRequired[dict[str, float]]


class ProtocolError(QuantdeckError):
    """Numbers of different protocols were about to be compared."""


@cache
def package_version(name: str) -> str:
    """Installed version of a package, without importing it; `absent` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def versions(*names: str) -> dict[str, str]:
    """Installed versions of the packages that a measurement depends on."""
    return {name: package_version(name) for name in names}


def protocol_id(protocol: Mapping[str, Any]) -> str:
    """Short digest of a protocol: two numbers may share an axis only if theirs are equal."""
    stated = {key: value for key, value in protocol.items() if key != "summary"}
    return hashlib.sha256(json.dumps(stated, sort_keys=True).encode()).hexdigest()[:12]


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys in which two protocols differ, as `key: value of a, value of b`."""
    keys = sorted(set(a) | set(b))
    return [f"{key}: {a.get(key)!r}, {b.get(key)!r}" for key in keys if key != "summary" and a.get(key) != b.get(key)]
