"""A token that a job may see is in no file, no command line and no page, whatever a program does with it."""

from __future__ import annotations

import json

import psutil
import pytest

from backend.jobs import control, launch
from backend.jobs.logs.tail import tail
from tests.faults.test_logs import TOKEN, leaks
from tests.jobs.harness import until
from ui.logview import log_after


@pytest.mark.parametrize("end", ["well", "badly"])
def test_a_jobs_token_stays_in_its_programs(jobs, monkeypatch, end):
    """In a line, a trace, an address, the environment, in pieces; and `ps` shows none."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    job = jobs.create({"name": "w4", "settings": {"sleep_at": 1}}, spill=end)
    launch.ensure_scheduler(jobs.home)
    seen = set()

    def over():
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if any(str(jobs.home.root) in word for word in words):
                seen.add(" ".join(words))
        now = jobs.get(job)
        if now.progress.get("stage") == "quantize" and now.state == "running":
            control.cancel(jobs.home, job.uid)
        return not now.is_active

    until(over, 120.0)
    ended = jobs.get(job)
    assert ended.state == {"well": "cancelled", "badly": "failed"}[end], ended.reason
    lines = tail(control.log_path(jobs.home, job.uid))[0]
    assert any("spilt [redacted]" in line for line in lines), lines[-20:]
    if end == "badly":
        assert "401 for [redacted]" in ended.reason
    assert len(seen) >= 3 and not any(TOKEN[:12] in words for words in seen), "a command line tells it"
    assert leaks(jobs.home.root, TOKEN) == []
    assert TOKEN[:12] not in json.dumps(log_after(jobs.home, {"uid": job.uid}))
    assert TOKEN[:12] not in json.dumps([jobs.store.history(job.uid), ended.reason, ended.progress, ended.result])
