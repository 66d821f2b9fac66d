"""A store with very many jobs, as years of use would leave it: rows put in by SQL, with results of a real size."""

from __future__ import annotations

import json
import sqlite3

from backend.jobs.store import JobStore
from backend.paths import Home
from ui.draft import TEMPLATE

STATES = ("succeeded", "succeeded", "succeeded", "failed", "cancelled")


def result(number: int) -> str:
    """About 8 kB, as a job with one configuration of a model with 32 layers has."""
    row = {
        "metric": "perplexity", "name": "Perplexity", "unit": "", "protocol": "512 tokens", "protocol_id": "p",
        "baseline": 7.0, "quantized": 7.0 + number % 9 / 10, "impact": number % 9 / 10, "interval": None,
        "interval_method": None, "higher_is_better": False, "cached_at": None,
    }  # fmt: skip
    size = {**row, "metric": "size", "name": "Size", "unit": "GB", "baseline": 15.0, "quantized": 5.0, "impact": -10.0}
    layers = [{"layer": f"model.layers.{i}", "error": 0.01, "rtn_error": 0.02, "notes": ["x" * 120]} for i in range(32)]
    entry = {
        "name": "w4", "label": "AWQ 4 bit", "artefact": f"/nowhere/{number}", "rows": [row, size], "table": "",
        "layers": layers, "skipped": {}, "notes": [], "manifest": {"files": {}}, "bytes": 1, "reason": None,
    }  # fmt: skip
    return json.dumps({"results": [entry], "rows": [row, size], "artefact": entry["artefact"]})


def fill(home: Home, number: int = 10_000, states: tuple[str, ...] = STATES) -> None:
    """Put that many jobs into the store of a home, `job-00000` the oldest, each with its history."""
    JobStore(home)
    with sqlite3.connect(home.jobs_db) as connection:
        for i in range(number):
            state, uid, at = states[i % len(states)], f"{i:012x}{i:010x}", f"2026-01-01T{i // 3600:02d}:00:00.000+00:00"
            connection.execute(
                "INSERT INTO jobs (uid, job_id, folder, model, algorithm, device, state, reason, config_yaml, "
                "progress, result, artefact, created_at, started_at, finished_at) "
                "VALUES (?, ?, ?, ?, 'AutoAWQ', 'cpu', ?, ?, ?, '{}', ?, ?, ?, ?, ?)",
                [
                    uid, f"job-{i:05d}", f"user_data/jobs/Kompress/job-{i:05d}", f"org/model-{i % 50}", state,
                    None if state == "succeeded" else f"why {i}", TEMPLATE, result(i) if state == "succeeded" else None,
                    f"/nowhere/{i}" if state == "succeeded" else None, at, at, at,
                ],
            )  # fmt: skip
            connection.execute(
                "INSERT INTO job_events (uid, attempt, to_state, actor, at) VALUES (?, 1, ?, 'test', ?)",
                [uid, state, at],
            )
