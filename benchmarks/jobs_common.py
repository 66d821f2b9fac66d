"""What the parts of the benchmark of jobs share: homes, jobs, waiting, rows of the table."""

from __future__ import annotations

import json
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.jobs import launch
from backend.jobs.states import FINAL
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.faults import engine
from tests.faults.chaos import end

OFF = {"EVALUATION": {"ENABLED": False}, "BENCHMARK": {"ENABLED": False}}

Row = dict[str, Any]


@contextmanager
def own_home(settings: str = "[jobs]\ncpu_slots = 2\n") -> Iterator[Home]:
    """A home for one part; what works for it is killed at the end."""
    with tempfile.TemporaryDirectory(prefix="quantdeck-bench-") as folder:
        home = Home(Path(folder).resolve() / "home")
        engine.prepare_home(home.root, settings)
        try:
            yield home
        finally:
            end(home)


def row(what: str, values: list[float], unit: str, note: str = "") -> Row:
    """The order statistics of some measured values."""
    ordered = sorted(values)
    at = lambda share: ordered[min(len(ordered) - 1, int(share * len(ordered)))]  # noqa: E731
    return {
        "what": f"{what} ({len(values)})", "median": at(0.5), "p95": at(0.95), "largest": ordered[-1], "unit": unit,
        "note": note,
    }  # fmt: skip


def cells(one: Row) -> list[str]:
    """A row of the table as text."""
    shown = [f"{one[name]:.0f}" if one[name] >= 100 else f"{one[name]:.3g}" for name in ("median", "p95", "largest")]
    return [one["what"], *(f"{number} {one['unit']}" for number in shown)]


def until(condition: Callable[[], Any], seconds: float = 120.0) -> Any:
    """What the condition returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise RuntimeError("this took too long; the benchmark stops")
        time.sleep(0.01)
    return found


def text_of(name: str, **more: Any) -> str:
    """A job file without measurements."""
    return demo_text(name, **OFF, **more)


def create(home: Home, name: str, **more: Any) -> Job:
    """A queued job, and a scheduler that sees it."""
    text = text_of(name, **more)
    job = JobStore(home).create(text, parse_yaml(text).config, device="cpu")
    launch.ensure_scheduler(home)
    return job


def fill(home: Home, count: int, state: str) -> None:
    """Copies of one job, written at once: through `create` the syncs of the disk alone would take minutes."""
    store = JobStore(home)
    text = text_of("first")
    first = store.create(text, parse_yaml(text).config, device="cpu")
    result = json.dumps(
        {
            "artefact": "/nowhere", "model_dir": "/nowhere",
            "rows": [
                {
                    "metric": "perplexity", "name": f"Perplexity {n}", "baseline": 2.5, "quantized": 2.6, "impact": 0.1,
                    "interval": [0.0, 0.2], "unit": "", "higher_is_better": False, "protocol": "benchmark",
                }
                for n in range(6)
            ],
            "layers": [{"layer": f"model.layers.{n}", "error": 0.01, "rtn_error": 0.02} for n in range(32)],
        }
    )  # fmt: skip
    done = state in FINAL
    with sqlite3.connect(home.jobs_db, isolation_level=None) as db:
        db.row_factory = sqlite3.Row
        one = dict(db.execute("SELECT * FROM jobs").fetchone())
        columns = ", ".join(one)
        marks = ", ".join(f":{name}" for name in one)
        db.execute("BEGIN")
        for number in range(1, count):
            uid = f"{int(first.uid[:12], 16) + number:012x}{number:010x}"
            times = (
                {"started_at": one["created_at"], "finished_at": one["created_at"], "result": result} if done else {}
            )
            new = {"uid": uid, "job_id": f"job-{number:05d}", "folder": f"x/{number}", "state": state, **times}
            db.execute(f"INSERT INTO jobs ({columns}) VALUES ({marks})", {**one, **new})
            query = (
                "INSERT INTO job_events (uid, attempt, from_state, to_state, actor, at) VALUES (?, 1, NULL, ?, ?, ?)"
            )
            db.execute(query, [uid, "queued", "user", one["created_at"]])
        db.execute("COMMIT")
    db.close()
