"""How long a job may take and what memory it may need, told only from jobs that have run in this home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from backend.disk import BYTE_UNITS
from backend.errors import QuantdeckError
from backend.jobs.job import Job
from backend.jobs.results import measured
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import JobConfig, parse_yaml

LOOKED_AT = 20  # newest jobs that succeeded
NOT_MAKING = ("download", "evaluate", "benchmark", "report", "publish", "trtllm")
"""Beginnings of the names of stages that do not make the model."""


@dataclass(frozen=True)
class Estimate:
    """What an earlier job of the same settings lets one expect.

    Attributes:
        basis: Name of that job.
        seconds: To make the model, scaled by bytes of weights and calibration tokens.
        peak_bytes: Largest memory of any of its stages; None unless its model was as large and it read as much text.
    """

    basis: str
    seconds: float
    peak_bytes: int | None


def estimate(home: Home, config: JobConfig, weight_bytes: int, device: str) -> Estimate | None:
    """Look for the newest job of the same algorithm settings on the same device.

    Args:
        home: Whose jobs are looked at.
        config: The job that is to start.
        weight_bytes: Of its model.
        device: Where it will run.

    Returns:
        None if there is no such job.
    """
    tokens = _tokens(config)
    for job in JobStore(home).jobs(states=("succeeded",), limit=LOOKED_AT):
        if job.algorithm != config.ALGORITHM or job.device != device or job.attempt > 1:
            continue  # timings of a job that was resumed are of its last part
        before, spent, size = _config(job.config_yaml), _seconds(job), _weight_bytes(job)
        if before is None or not spent or not size or before.algorithm_settings != config.algorithm_settings:
            continue
        scale = weight_bytes * tokens / (size * _tokens(before))
        alike = size == weight_bytes and _tokens(before) == tokens
        return Estimate(job.job_id, spent * scale, (job.result or {}).get("peak_rss_bytes") if alike else None)
    return None


def _tokens(config: JobConfig) -> int:
    return config.calibration.SAMPLES * config.calibration.SEQUENCE_LENGTH


@lru_cache(maxsize=64)
def _config(text: str) -> JobConfig | None:
    try:
        return parse_yaml(text).config
    except QuantdeckError:  # a file of an older version
        return None


def _seconds(job: Job) -> float:
    timings: Mapping[str, Any] = (job.result or {}).get("timings") or {}
    return sum(float(spent["wall_s"]) for name, spent in timings.items() if not name.startswith(NOT_MAKING))


def _weight_bytes(job: Job) -> int:
    """Of the model that the job quantized, as it was measured; 0 if it was not."""
    rows = [row for entry in measured(job.result) for row in entry["rows"] if row["metric"] == "size"]
    return round(rows[0]["baseline"] * BYTE_UNITS[rows[0]["unit"]]) if rows else 0
