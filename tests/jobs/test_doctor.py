"""The doctor finds what is wrong, says how to mend it, mends what is safe, and finds nothing in a sound home."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from backend import accounts, cli
from backend.engines.environments import environments
from backend.files import write_json
from backend.jobs import doctor
from backend.jobs.doctor_alive import instance_lives
from backend.jobs.doctor_findings import SHOWN, Finding, Problem, report
from backend.jobs.publish import publish
from backend.jobs.store import JobStore
from backend.process import hold_lock
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.faults.chaos import end

CPU = ["cpu:0"]


@pytest.fixture
def store(home) -> JobStore:
    store = JobStore(home)
    store.jobs()
    return store


def create(store, name="demo", **changes):
    text = demo_text(name, **changes)
    return store.create(text, parse_yaml(text).config, device="cpu")


def running(store, name="demo", **changes):
    job = create(store, name, **changes)
    assert store.grant(job.uid, 1, CPU)
    assert store.move(job.uid, "running", actor="runner", attempt=1)
    return store.get(job.uid)


def succeeded(store, name="demo"):
    """A job with a published model, as a runner leaves it."""
    job = running(store, name)
    staging = store.home.run_dir(job.uid) / "staging"
    staging.mkdir(parents=True)
    (staging / "model.safetensors").write_bytes(b"0123456789")
    target = store.home.root / job.folder
    manifest = publish(staging, target, {"job": job.uid})
    entry = {"name": "w4", "label": "W4", "artefact": str(target), "manifest": manifest}
    store.update(job.uid, 1, result={"artefact": str(target), "results": [entry]}, artefact=str(target))
    assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
    return store.get(job.uid), target


def problems(home, **more):
    more.setdefault("grace_s", 0.0)
    return {f.check: [p.what for p in f.problems] for f in doctor.examine(home, **more) if f.problems}


def sql(home, *statement):
    with sqlite3.connect(home.jobs_db, isolation_level=None) as db:
        db.execute(*statement)
    db.close()


def test_a_new_home_and_one_with_finished_jobs_are_sound(home, store):
    succeeded(store)
    waiting = create(store, "other")
    store.move(waiting.uid, "cancelled", actor="user", attempt=1)
    assert problems(home, deep=True) == {}


def test_a_home_without_a_store_is_left_without_one(home):
    home.root.mkdir()
    assert problems(home) == {}
    assert not home.jobs_db.exists()


def test_a_job_without_its_runner_is_found_after_the_grace_and_not_before(home, store):
    job = running(store)
    found = problems(home)
    assert "its runner is gone" in found["runners"][0] and job.uid in found["runners"][0]
    assert "no scheduler" in found["scheduler"][0]
    began = time.monotonic()
    assert "runners" in problems(home, grace_s=2.0)
    assert time.monotonic() - began >= 2.0


def test_a_job_with_a_living_runner_is_sound(home, store):
    job = running(store)
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        assert set(problems(home)) == {"scheduler"}
        store.set_stalled(job.uid, 1, True)
        assert "has not moved" in problems(home)["runners"][0]


def test_what_is_put_right_within_the_grace_is_no_problem(home, store):
    job = running(store)
    code = "import sys, time; from backend.jobs.store import JobStore; from backend.paths import Home; time.sleep(1)\n"
    code += "JobStore(Home.at(sys.argv[1])).move(sys.argv[2], 'failed', actor='scheduler', attempt=1)"
    with subprocess.Popen([sys.executable, "-c", code, str(home.root), job.uid]):
        assert problems(home, grace_s=60.0) == {}


def test_a_process_that_outlives_its_job_is_found_and_one_of_another_home_is_not(home, store, tmp_path):
    job = running(store)
    mark = {**os.environ, "QUANTDECK_JOB": f"{job.uid}:1", "QUANTDECK_HOME": str(home.root)}
    foreign = {**mark, "QUANTDECK_HOME": str(tmp_path / "elsewhere")}
    with subprocess.Popen(["sleep", "60"], env=mark) as ours, subprocess.Popen(["sleep", "60"], env=foreign) as other:
        try:
            assert "processes" not in problems(home)
            store.move(job.uid, "failed", actor="runner", attempt=1)
            (what,) = problems(home)["processes"]
            assert f"process {ours.pid} (sleep)" in what and "attempt 1" in what
            assert str(other.pid) not in what
        finally:
            ours.kill()
            other.kill()
    assert problems(home) == {}


def test_a_process_of_an_older_attempt_is_found(home, store):
    job = running(store)
    mark = {**os.environ, "QUANTDECK_JOB": f"{job.uid}:1", "QUANTDECK_HOME": str(home.root)}
    with subprocess.Popen(["sleep", "60"], env=mark) as process:
        try:
            store.move(job.uid, "lost", actor="scheduler", attempt=1)
            store.requeue(job.uid, 1, actor="scheduler", reason="the runner died")
            assert store.grant(job.uid, 2, CPU)
            with hold_lock(home.run_dir(job.uid) / "runner.lock"):
                assert f"process {process.pid}" in problems(home)["processes"][0]
        finally:
            process.kill()


def test_a_stale_lease_is_found_and_mended(home, store):
    job = create(store)
    store.move(job.uid, "cancelled", actor="user", attempt=1)
    sql(home, "INSERT INTO leases VALUES ('gpu:GPU-1', ?, 1, 'now')", [job.uid])
    assert "gpu:GPU-1" in problems(home)["leases"][0]
    (finding,) = [f for f in doctor.examine(home, mend=True, grace_s=0.0) if f.problems]
    assert finding.check == "leases" and finding.ok and finding.problems[0].mended
    assert store.leases() == [] and problems(home) == {}


def test_mending_starts_the_scheduler_which_finds_the_dead(home, store):
    job = running(store, MAX_ATTEMPTS=1)
    try:
        findings = doctor.examine(home, mend=True, grace_s=120.0)
    finally:
        end(home)
    assert [f.check for f in findings if f.problems] == []
    assert store.get(job.uid).state == "failed" and "runner process died" in store.get(job.uid).reason


def test_mending_leaves_the_lease_of_a_job_at_work(home, store):
    job = running(store)
    with hold_lock(home.run_dir(job.uid) / "runner.lock"), hold_lock(home.private / "scheduler.lock"):
        doctor.examine(home, mend=True, grace_s=0.0)
    assert [lease.uid for lease in store.leases()] == [job.uid]


def test_a_running_job_without_its_lease_is_found(home, store):
    job = running(store)
    sql(home, "DELETE FROM leases")
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        assert "holds nothing" in problems(home)["leases"][0]


@pytest.mark.parametrize(
    ("damage", "said", "quick"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "is missing", True),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"short"), "has 5 bytes", True),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"9876543210"), "was changed", False),
        (lambda folder: (folder / "quantdeck_manifest.json").write_text("{"), "cannot be read", True),
    ],
)
def test_a_damaged_result_is_found(home, store, damage, said, quick):
    _, folder = succeeded(store)
    damage(folder)
    assert ("results" in problems(home)) == quick
    assert said in problems(home, deep=True)["results"][0]


def test_a_result_without_manifest_is_half_published_unless_its_job_is_at_work(home, store):
    job = running(store)
    (home.root / job.folder).mkdir(parents=True)
    (home.root / job.folder / "model.safetensors").write_bytes(b"0123")
    with hold_lock(home.run_dir(job.uid) / "runner.lock"):
        assert "half-published" not in problems(home)
    store.move(job.uid, "failed", actor="runner", attempt=1)
    assert job.folder in problems(home)["half-published"][0]


def test_leftovers_are_found_and_only_safe_ones_are_removed(home, store):
    job, _ = succeeded(store)
    staging = home.run_dir(job.uid) / "out.tmp"
    staging.mkdir()
    unknown = home.run_dir("0123456789ab0123456789")
    write_json(unknown / "report.json", {})
    temporary = unknown / ".report.json.abc.tmp"
    temporary.write_text("{")
    os.utime(temporary, (0, 0))
    found = problems(home)["run folders"]
    assert len(found) == 3 and any("belongs to no job" in what for what in found)
    left = [p for f in doctor.examine(home, mend=True, grace_s=0.0) for p in f.problems if not p.mended]
    assert ["belongs to no job" in p.what for p in left] == [True]
    assert not staging.exists() and not temporary.exists() and (unknown / "report.json").exists()


def test_a_history_that_skips_a_state_is_found(home, store):
    job, _ = succeeded(store)
    sql(home, "DROP TRIGGER job_events_no_delete")  # which keeps others from this
    sql(home, "DELETE FROM job_events WHERE uid = ? AND to_state = 'starting'", [job.uid])
    assert "went from starting to running, but it was queued" in problems(home)["history"][0]


def test_a_state_that_the_history_does_not_lead_to_is_found(home, store):
    job, _ = succeeded(store)
    sql(home, "UPDATE jobs SET state = 'failed' WHERE uid = ?", [job.uid])
    assert "its history ends with succeeded" in problems(home)["history"][0]


def test_a_damaged_database_is_told_and_the_rest_is_still_looked_at(home, store):
    for number in range(30):
        create(store, f"job-{number}")
    data = bytearray(home.jobs_db.read_bytes())
    data[8192:20480] = os.urandom(12288)
    home.jobs_db.write_bytes(data)
    found = problems(home)
    assert "job store" in found
    assert {"disk", "permissions"} <= {f.check for f in doctor.examine(home, grace_s=0.0)}


def test_open_permissions_are_found_and_mended(home, store):
    accounts.add(home, "anna", "correct horse battery")
    (home.private / "accounts.json").chmod(0o644)
    home.private.chmod(0o755)
    found = problems(home)
    assert len(found["permissions"]) == 2 and "can be read by other users" in found["accounts"][0]
    doctor.examine(home, mend=True, grace_s=0.0)
    assert problems(home) == {}
    assert (home.private / "accounts.json").stat().st_mode & 0o777 == 0o600


def test_a_broken_list_of_accounts_is_found(home, store):
    (home.private / "accounts.json").write_text("{}")
    (home.private / "accounts.json").chmod(0o600)
    assert "nobody is let in" in problems(home)["accounts"][0]


def test_wrong_settings_are_told(home, store):
    (home.root / "quantdeck.toml").write_text("[jobs]\ncpu_slotz = 2\n")
    assert "cpu_slots" in problems(home)["settings"][0]


def test_too_little_room_is_told(home, store):
    (home.root / "quantdeck.toml").write_text(f"[jobs]\nmin_free_bytes = {10**18}\n")
    assert "are free" in problems(home)["disk"][0]


def test_a_half_built_environment_is_found(home, store, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path / "environments"))
    env = environments()["autoawq"]
    env.folder.mkdir(parents=True)
    assert str(env.folder) in problems(home)["environments"][0]
    with hold_lock(env.root / f"{env.name}-{env.hash}.lock"):
        assert problems(home) == {}  # it is being built


def test_a_store_of_a_newer_version_is_told_and_left_alone(home, store):
    sql(home, "INSERT INTO leases VALUES ('cpu:0', ?, 1, 'now')", [create(store).uid])
    sql(home, "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('jobs', 'of_tomorrow', 'now')")
    before = home.jobs_db.read_bytes()
    assert "newer Quantdeck" in problems(home, mend=True)["job store"][0]
    assert home.jobs_db.read_bytes() == before


def test_a_job_that_stays_lost_is_found(home, store):
    job = running(store)
    store.move(job.uid, "lost", actor="scheduler", attempt=1)
    assert "was not queued again" in problems(home)["runners"][0]


def test_of_many_problems_some_are_shown_and_the_rest_counted():
    many = tuple(Problem(f"number {n}", "wait") for n in range(SHOWN + 5))
    told = report([Finding("leases", "", many)])
    assert told.count("PROBLEM") == SHOWN and "and 5 more of leases" in told


def test_the_lock_of_a_scheduler_that_is_nowhere_listed_is_found(home, store):
    with hold_lock(home.private / "scheduler.lock"):
        assert "instances" in problems(home)["scheduler"][0]
        store.register("scheduler")
        assert problems(home) == {}


def test_the_command_tells_the_outcome_by_its_exit_code(home, store, capsys):
    job, folder = succeeded(store)
    assert cli.main(["doctor", "--home", str(home.root)]) == 0
    assert "ok       job store (1 jobs" in capsys.readouterr().out
    (folder / "model.safetensors").unlink()
    assert cli.main(["doctor", "--home", str(home.root)]) == 1
    out = capsys.readouterr().out
    assert f"PROBLEM  results: job demo: {folder}/model.safetensors is missing" in out and "to mend: " in out
    assert cli.main(["doctor", "--json", "--deep", "--home", str(home.root)]) == 1
    findings = json.loads(capsys.readouterr().out)
    assert [f["check"] for f in findings if not f["ok"]] == ["results"]
    assert findings[-1]["problems"] == [] and job.uid


def test_a_process_with_a_reused_pid_is_no_living_instance():
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert instance_lives({"pid": os.getpid(), "started": int(stat[19])})
    assert not instance_lives({"pid": os.getpid(), "started": int(stat[19]) - 1})
