"""The disk under a running dashboard is full (fault 8): it shows the jobs, and says what was not stored."""

from __future__ import annotations

from backend.jobs.store import JobStore
from backend.paths import Home
from tests.faults.browser import Calls, listed
from tests.faults.troubles import fill, small_disk
from tests.jobs.stored import make
from tests.security.site import call, outcome, running


def test_a_dashboard_on_a_full_disk_answers_and_goes_on_when_there_is_room(tmp_path):
    home = Home.at(tmp_path / "home")
    with small_disk(home.root, "2m"):
        store = JobStore(home)
        job = make(store, "kept")
        with running(home) as site, site.client(origin=site.origin) as client:
            calls = Calls.of(client.get("/config").json())
            index, fn = next((i, fn) for i, fn in site.blocks.fns.items() if fn.name == "on_action")

            def cancel(session):
                event = {"act": "cancel", "uid": job.uid}
                assert call(client, index, [None] * len(fn.inputs), session, event).status_code == 200
                last = outcome(client, session)[-1]
                assert last["success"], last
                return str(last["output"])

            fill(home.root / "filler")
            path, body = calls.load_jobs()
            assert "kept" in listed(client.post(path, json=body))
            assert client.get("/health").json()["status"] == "ok"
            assert client.get(f"/download/{job.uid}.yaml").text == job.config_yaml
            told = cancel("full")
            assert "cannot be used" in told and "database or disk is full" in told, told
            assert store.get(job.uid) == job and store.check() == []
            (home.root / "filler").unlink()
            assert "cannot be used" not in cancel("room")
            assert store.get(job.uid).state == "cancelled"
