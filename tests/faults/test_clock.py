"""The clock of the machine is set while a job runs (fault 13): real scheduler and runner, with another time of day."""

from __future__ import annotations

import os
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from backend.jobs import launch

DAY = 24 * 3600


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_day_more_or_less_ends_no_job_and_starts_none_twice(jobs, tmp_path, monkeypatch, jump):
    clock = tmp_path / "clock"
    clock.write_text("0")
    monkeypatch.setenv("QUANTDECK_TEST_CLOCK", str(clock))  # for what this process starts, not for itself
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "clock"))
    job = jobs.create({"name": "w4", "settings": {"sleep_s": 1.0}}, name="under-way")
    waits = jobs.create({"name": "w4", "settings": {"sleep_s": 1.0}}, name="waits")  # one file tells all jobs
    launch.ensure_scheduler(jobs.home)
    jobs.at_layer(job, 1)
    started, leases = jobs.get(job).started_at, jobs.store.leases()
    other = tmp_path / "other"
    other.write_text(str(jump))
    os.replace(other, clock)
    jobs.at_layer(job, 3)
    assert jobs.store.leases() == leases
    done, later = jobs.until(job), jobs.until(waits)
    for one in (done, later):
        assert (one.state, one.attempt, one.stalled) == ("succeeded", 1, False), one.reason
        assert one.created_at <= one.started_at <= one.finished_at
        assert all(value >= 0 for cost in one.result["timings"].values() for value in cost.values())
        history = jobs.store.history(one.uid)
        assert [e["to_state"] for e in history] == ["queued", "starting", "running", "succeeded"]
        assert [e["at"] for e in history] == sorted(e["at"] for e in history)
    took = datetime.fromisoformat(done.finished_at) - datetime.fromisoformat(started)
    assert (took > timedelta(hours=23)) == (jump > 0), "the runner did not see the other time"
    assert len(jobs.calls(job)) == 1
