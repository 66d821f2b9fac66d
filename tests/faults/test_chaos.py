"""Twenty jobs under random kill -9 (fault 26, the short run; `make chaos` is the long one)."""

from __future__ import annotations

import pytest

from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.faults import engine
from tests.faults.chaos import Outcome, chaos, end, examine

SEED = 26


def test_whatever_is_killed_every_job_ends_once_and_nothing_is_left(tmp_path, monkeypatch):
    for name, value in engine.environment().items():
        monkeypatch.setenv(name, value)
    home = Home(tmp_path / "home")
    try:
        outcome = chaos(home, 20, SEED, kills=20, limit_s=300)
    finally:
        end(home)
    assert outcome.problems == []
    assert outcome.states["succeeded"] >= 10, outcome  # most jobs survive what is done to them
    assert min(outcome.done[what] for what in ("runner", "scheduler", "app")) >= 1, outcome
    assert max(outcome.attempts) >= 2, outcome


def test_the_check_after_chaos_sees_what_must_not_be(tmp_path):
    """One home with every kind of trouble: the long test above must be able to fail."""
    home = Home(tmp_path / "home")
    engine.prepare_home(home.root)
    store, text = JobStore(home), demo_text("kept")
    job = store.create(text, parse_yaml(text).config, device="cpu")
    assert store.grant(job.uid, 1, ["cpu:0"])
    (home.root / "submitted.txt").write_text("kept\ngone\n")
    (home.root / "starts.txt").write_text(f"{job.uid} 1 10 alone\n{job.uid} 1 11 overlap\n")
    outcome = Outcome()
    examine(home, 2, outcome, grace_s=0.0)
    told = "\n".join(outcome.problems)
    assert "job gone was submitted and is lost" in told and "there are 1 jobs instead of 2" in told
    assert f"attempt 1 of job {job.uid} was started 2 times" in told and "two engines" in told
    assert "lease cpu:0" in told and "doctor: runners" in told


@pytest.fixture(autouse=True)
def _no_home(monkeypatch):
    monkeypatch.delenv("QUANTDECK_HOME", raising=False)
