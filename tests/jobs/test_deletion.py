"""Deleting jobs on real files: the way back, the way without one, crashes in the middle, links that lead elsewhere."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from backend import cli
from backend.errors import ConfigErrors, JobError
from backend.jobs import control, deletion, doctor, estimate, launch, removal
from backend.jobs.publish import publish
from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from backend.process import FAILPOINT_VARIABLE, hold_lock
from backend.schema import parse_yaml
from tests.conftest import demo_text
from tests.jobs.stored import make, start

WEIGHTS = 50_000
LOG = "a line\n" * 100


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch):
    """These jobs were done long ago; nothing may start any."""
    monkeypatch.setattr(launch, "ensure_scheduler", lambda home: False)


@pytest.fixture
def store(home) -> JobStore:
    return JobStore(home)


def done(store, name="one", **keys):
    """A job that succeeded, with its model, log and working folder."""
    job = make(store, name, **keys)
    assert start(store, job, "cpu:0")
    staging = store.home.run_dir(job.uid) / "out.tmp"
    (staging / "part").mkdir(parents=True)
    for path in (staging / "model.safetensors", staging / "part" / "more.safetensors"):
        path.write_bytes(os.urandom(WEIGHTS))
    manifest = publish(staging, store.home.root / job.folder, {"job": job.uid})
    (store.home.run_dir(job.uid) / "events.jsonl").write_text("{}\n")
    log = control.log_path(store.home, job.uid)
    log.parent.mkdir(parents=True, exist_ok=True)
    for path in (log, log.with_name("log.log.1")):
        path.write_text(LOG)
    folder = str(store.home.root / job.folder)
    entry = {"name": "w4", "label": "W4", "artefact": folder, "manifest": manifest, "rows": [], "bytes": WEIGHTS}
    assert store.update(job.uid, 1, result={"results": [entry], "timings": {}}, artefact=folder)
    assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
    return store.get(job.uid)


def row(home, uid):
    with sqlite3.connect(home.jobs_db) as db:
        db.row_factory = sqlite3.Row
        return dict(db.execute("SELECT * FROM jobs WHERE uid = ?", [uid]).fetchone())


def left(home, job):
    """What of a job is on the disk."""
    models, log = home.root / job.folder, home.log_file(parse_yaml(demo_text(job.job_id)).config)
    found = {"models": models.exists(), "log": log.exists(), "run": home.run_dir(job.uid).exists()}
    return {name for name, there in found.items() if there}


def problems(home, **more):
    return {f.check: [p.what for p in f.problems] for f in doctor.examine(home, grace_s=0.0, **more) if not f.ok}


ALL = {"models", "log", "run"}


# -- out of the list, and back


def test_a_deleted_job_is_in_no_list_and_comes_back_as_it_was(home, store):
    job, other = done(store), done(store, "two")
    gone = deletion.delete(home, "one", actor="user ada")
    assert gone.deleted_at and left(home, job) == ALL
    assert [j.job_id for j in store.jobs()] == ["two"] and [j.uid for j in store.summaries(deleted=True)] == [job.uid]
    assert store.counts() == {"succeeded": 1} and store.count() == 1 and store.count(deleted=True, search="one") == 1
    assert store.get(job.uid).deleted_at == gone.deleted_at  # an old link still says what became of it
    with pytest.raises(JobError, match="no job 'one'"):
        store.get("one")
    assert deletion.restore(home, "one", actor="user bob") == job
    assert store.get("one") == job and store.get("two") == other and store.count(deleted=True) == 0
    told = [(e["from_state"], e["to_state"], e["actor"], e["reason"]) for e in store.history(job.uid)][-2:]
    assert told == [
        ("succeeded", "succeeded", "user ada", "deleted"), ("succeeded", "succeeded", "user bob", "restored"),
    ]  # fmt: skip
    assert problems(home) == {} and store.check() == []


def test_an_active_job_is_cancelled_first_and_a_deleted_one_does_not_go_on(home, store):
    job = make(store)
    with pytest.raises(JobError, match="is queued; cancel it first"):
        deletion.delete(home, job.uid)
    assert start(store, job, "cpu:0")
    with pytest.raises(JobError, match="is running; cancel it first"):
        deletion.delete(home, job.uid)
    store.move(job.uid, "failed", actor="runner", attempt=1)
    deletion.delete(home, job.uid)
    with pytest.raises(JobError, match="deleted already"):
        deletion.delete(home, job.uid)
    with pytest.raises(JobError, match="is deleted; restore it first"):
        control.resume(home, job.uid)
    assert not store.resume(job.uid, actor="user", attempt=1) and row(home, job.uid)["state"] == "failed"
    with pytest.raises(JobError, match="no deleted job 'two'"):
        deletion.restore(home, "two")
    assert control.resume(home, deletion.restore(home, job.uid).uid).attempt == 2
    assert problems(home).keys() <= {"scheduler"}  # nobody starts it here


def test_the_name_of_a_deleted_job_stays_taken_until_it_is_deleted_for_good(home, store):
    job = done(store)
    deletion.delete(home, job.uid)
    with pytest.raises(ConfigErrors, match="taken by a deleted job of .*'one-2'"):
        make(store)
    deletion.erase(home, job.uid)
    again = done(store)
    assert again.uid != job.uid and left(home, again) == ALL and store.get("one") == again
    deletion.delete(home, "one")
    deletion.erase(home, "one")
    assert left(home, again) == set() and done(store).job_id == "one"


def test_estimates_forget_a_deleted_job(home, store, monkeypatch):
    job = done(store)
    looked_at = []
    monkeypatch.setattr(estimate, "_seconds", lambda job: looked_at.append(job.uid) or 0.0)
    config = parse_yaml(demo_text("next")).config
    estimate.estimate(home, config, 1, "cpu")
    deletion.delete(home, job.uid)
    estimate.estimate(home, config, 1, "cpu")
    assert looked_at == [job.uid]


# -- for good


def test_for_good_means_its_files_and_all_that_was_told_of_it_and_nothing_else(home, store):
    job, other = done(store), done(store, "two")
    cache = home.evaluation_cache() / "kept.json"
    cache.parent.mkdir(parents=True)
    cache.write_text("{}")
    with pytest.raises(JobError, match="no deleted job"):
        deletion.erase(home, job.uid)
    deletion.delete(home, job.uid)
    promised = deletion.size(home, job.uid)
    assert promised > 2 * WEIGHTS + 2 * len(LOG)
    assert deletion.erase(home, job.uid, actor="user ada") == promised
    assert left(home, job) == set() and not (home.user_data / "logs" / "one").exists()
    assert left(home, other) == ALL and cache.exists() and store.jobs() == [other]
    assert store.summaries(deleted=True) == [] and store.count(deleted=True) == 0
    for look in (store.get, store.get_deleted, lambda uid: deletion.restore(home, uid)):
        with pytest.raises(JobError, match="no "):
            look(job.uid)
    kept = row(home, job.uid)
    assert (kept["erased"], kept["config_yaml"], kept["result"], kept["artefact"]) == ("done", "", None, None)
    assert store.history(job.uid)[-1]["reason"] == "deleted for good"
    assert problems(home, deep=True) == {} and store.check() == []


def test_a_log_that_another_job_writes_to_stays(home, store):
    shared = {"LOGGING_PATH": "shared/logs"}
    job, other = done(store, "one", **shared), done(store, "two", **shared)
    for one in (job, other):
        deletion.delete(home, one.uid)
    deletion.erase(home, job.uid)
    assert (home.root / "shared/logs/log.log").read_text() == LOG
    deletion.erase(home, other.uid)
    assert list((home.root / "shared/logs").iterdir()) == []  # a folder that was not made for one job alone


def test_what_others_use_is_not_removed(home, store):
    job, nested = done(store), done(store, "two", USER_FOLDER="user_data/jobs/Kompress/one")
    deletion.delete(home, job.uid)
    with pytest.raises(JobError, match="the folder of job two lies in that of job one"):
        deletion.erase(home, job.uid)
    deletion.delete(home, nested.uid)
    deletion.erase(home, nested.uid)
    reader = make(store, "reader", CUSTOM_MODEL_PATH=f"{job.folder}/", MODEL="x")
    with pytest.raises(JobError, match="job reader works with the model of job one"):
        deletion.erase(home, job.uid)
    store.move(reader.uid, "cancelled", actor="user", attempt=1)
    with hold_lock(home.run_dir(job.uid) / "runner.lock"), pytest.raises(JobError, match="has not ended yet"):
        deletion.erase(home, job.uid)
    code = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ);"
    code += "f.close(); print('mapped', flush=True); sys.stdin.read()"
    file = home.root / job.folder / "model.safetensors"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as chat:
        assert chat.stdout.readline() == "mapped\n"
        with pytest.raises(JobError, match=rf"in use by process {chat.pid} \(python.*end that program"):
            deletion.erase(home, job.uid)
        chat.stdin.close()
    assert left(home, job) == ALL
    deletion.erase(home, job.uid)
    assert left(home, job) == set()


def test_bytes_of_files_with_another_name_elsewhere_are_not_promised(home, store, tmp_path):
    job = done(store)
    deletion.delete(home, job.uid)
    before = deletion.size(home, job.uid)
    os.link(home.root / job.folder / "model.safetensors", tmp_path / "elsewhere")
    assert deletion.size(home, job.uid) == before - WEIGHTS
    assert deletion.erase(home, job.uid) == before - WEIGHTS and (tmp_path / "elsewhere").stat().st_size == WEIGHTS


# -- crashes


CODE = """
import os, signal, sys
from backend.jobs import deletion
from backend.paths import Home
kill_at, unlink, seen = int(sys.argv[3]), os.unlink, [0]
def dying(*args, **more):
    seen[0] += 1
    if seen[0] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return unlink(*args, **more)
os.unlink = dying
deletion.erase(Home.at(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize(
    ("point", "file"), [("erase.begun", 0), ("", 1), ("", 2), ("erase.removed", 0), ("", 4), ("erase.empty", 0)]
)
def test_a_deletion_that_is_killed_is_found_and_gone_on_with(home, store, point, file):
    job, other = done(store), done(store, "two")
    deletion.delete(home, job.uid)
    dead = subprocess.run(
        [sys.executable, "-c", CODE, str(home.root), job.uid, str(file)], cwd=PROJECT, capture_output=True,
        env={**os.environ, FAILPOINT_VARIABLE: point},
    )  # fmt: skip
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    assert row(home, job.uid)["erased"] == "begun"
    # Half of it may be gone: no way back, and nobody takes it for a job.
    with pytest.raises(JobError, match="cannot be restored any more"):
        deletion.restore(home, job.uid)
    with pytest.raises(JobError, match="no job"):
        store.get(job.uid)
    with pytest.raises(ConfigErrors, match="taken by a deleted job"):
        make(store)
    found = problems(home)
    assert list(found) == ["deletions"] and "job one" in found["deletions"][0]
    if file == 1:
        doctor.examine(home, grace_s=0.0, mend=True)
    else:
        deletion.erase(home, job.uid)
    assert left(home, job) == set() and row(home, job.uid)["erased"] == "done"
    assert left(home, other) == ALL and problems(home, deep=True) == {}
    assert [e["reason"] for e in store.history(job.uid)][-2:] == ["deleted", "deleted for good"]
    assert done(store).job_id == "one"


def test_two_do_not_delete_at_once(home, store):
    job = done(store)
    deletion.delete(home, job.uid)
    code = "import sys; from backend.process import hold_lock; from pathlib import Path\n"
    code += "with hold_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    path = home.private / "erase.lock"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdout.readline() == "held\n"
        with pytest.raises(JobError, match="another deletion is under way"):
            deletion.erase(home, job.uid)
        first.stdin.close()
    assert left(home, job) == ALL and row(home, job.uid)["erased"] is None


# -- links and other places


def outside(tmp_path):
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "file").write_text("precious")
    return folder


def intact(folder):
    return (folder / "deep" / "file").read_text() == "precious"


@pytest.mark.parametrize("where", ["models", "run", "service", "log", "logs"])
def test_a_link_in_the_place_of_a_folder_is_refused_before_anything_is_removed(home, store, tmp_path, where):
    job, precious = done(store), outside(tmp_path)
    deletion.delete(home, job.uid)
    path = {
        "models": home.root / job.folder, "service": (home.root / job.folder).parent, "run": home.run_dir(job.uid),
        "log": home.user_data / "logs/one/log.log", "logs": home.user_data / "logs",
    }[where]  # fmt: skip
    path.rename(tmp_path / "aside")
    path.symlink_to(precious / "deep" / "file" if where == "log" else precious)
    if where == "logs":
        (precious / "one").mkdir()
        (precious / "one" / "log.log").write_text("precious")
    for call in (deletion.erase, deletion.erase):
        with pytest.raises(JobError, match=f"{path} is a symbolic link"):
            call(home, job.uid)
    assert intact(precious) and row(home, job.uid)["erased"] is None and path.is_symlink()
    if where == "logs":
        assert (precious / "one" / "log.log").exists()
    path.unlink()
    (tmp_path / "aside").rename(path)
    deletion.erase(home, job.uid)
    assert left(home, job) == set() and intact(precious)


def test_links_inside_are_removed_and_what_they_lead_to_stays(home, store, tmp_path):
    job, precious = done(store), outside(tmp_path)
    (home.root / job.folder / "folder").symlink_to(precious)
    (home.root / job.folder / "file").symlink_to(precious / "deep" / "file")
    deletion.delete(home, job.uid)
    deletion.erase(home, job.uid)
    assert left(home, job) == set() and intact(precious)


def test_a_folder_that_becomes_a_link_meanwhile_leads_nowhere(home, tmp_path, monkeypatch):
    """The folder above is exchanged after it was opened: what is removed is still in the old one."""
    precious, target = outside(tmp_path), home.root / "a" / "b" / "deep"
    target.mkdir(parents=True)
    (target / "file").write_text("mine")
    real = os.lstat

    def exchange(path, **more):
        monkeypatch.setattr(os, "lstat", real)
        (home.root / "a" / "b").rename(home.root / "a" / "moved")
        (home.root / "a" / "b").symlink_to(precious)
        return real(path, **more)

    monkeypatch.setattr(os, "lstat", exchange)
    removal.remove(home.root, target)
    assert intact(precious) and not (home.root / "a" / "moved" / "deep").exists()


@pytest.mark.parametrize(
    "folder", ["", ".", "user_data", "user_data/.quantdeck", "../precious", "/etc", "a/../../precious"]
)
def test_a_store_that_names_another_folder_makes_nothing_be_removed(home, store, tmp_path, folder):
    job, precious = done(store), outside(tmp_path)
    deletion.delete(home, job.uid)
    with sqlite3.connect(home.jobs_db) as db:
        db.execute("UPDATE jobs SET folder = ? WHERE uid = ?", [folder, job.uid])
    with pytest.raises(JobError, match="nothing was removed"):
        deletion.erase(home, job.uid)
    assert left(home, job) == ALL and intact(precious)


def test_what_cannot_be_removed_is_told_and_can_be_tried_again(home, store, monkeypatch):
    job = done(store)
    deletion.delete(home, job.uid)
    real = os.unlink

    def refuse(path, **more):
        if path == "more.safetensors":
            raise PermissionError(1, "Operation not permitted", path)
        return real(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    with pytest.raises(JobError, match=r"cannot be removed: Operation not permitted \(more.safetensors\)"):
        deletion.erase(home, job.uid)
    assert list(problems(home)) == ["deletions"]
    monkeypatch.undo()
    monkeypatch.setattr(launch, "ensure_scheduler", lambda home: False)
    deletion.erase(home, job.uid)
    assert left(home, job) == set() and problems(home) == {}


# -- the doctor, and the command


def test_the_doctor_takes_no_offence_at_deleted_jobs(home, store):
    job, failed = done(store), make(store, "two")
    store.move(failed.uid, "cancelled", actor="user", attempt=1)
    (home.root / failed.folder).mkdir(parents=True)
    (home.root / failed.folder / "half").write_text("x")
    assert "half-published" in problems(home)
    for one in (job, failed):
        deletion.delete(home, one.uid)
    (home.root / job.folder / "model.safetensors").unlink()
    assert problems(home, deep=True) == {}
    deletion.restore(home, job.uid)
    assert "model.safetensors is missing" in problems(home)["results"][0]


def test_the_commands_delete_restore_and_ask_before_it_is_for_good(home, store, capsys, monkeypatch):
    job, other, busy = done(store), done(store, "two"), make(store, "busy")
    at = ["--home", str(home.root)]
    assert cli.main(["delete", "one", "busy", "nobody", "two", *at]) == 1
    told = capsys.readouterr()
    assert told.out == "job one: deleted\njob two: deleted\n"
    assert "busy is queued; cancel it first" in told.err and "no job 'nobody'" in told.err
    assert cli.main(["restore", "two", *at]) == 0 and store.get("two") == other
    assert cli.main(["jobs", "--deleted", "--json", *at]) == 0
    assert [j["uid"] for j in json.loads(capsys.readouterr().out.splitlines()[-1])] == [job.uid]

    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    assert cli.main(["delete", "--for-good", "one", *at]) == 2 and "give --yes" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    assert cli.main(["delete", "--for-good", "one", "two", *at]) == 1 and left(home, job) == left(home, other) == ALL
    assert "Delete 2 jobs for good? 2" in asked[0] and "kB become free" in asked[0]
    assert cli.main(["delete", "--for-good", "busy", *at]) == 1 and "cancel it first" in capsys.readouterr().err
    assert cli.main(["delete", "one", "--yes", *at]) == 2
    assert cli.main(["delete", "--for-good", "--yes", "one", "two", *at]) == 0
    assert left(home, job) == left(home, other) == set() and busy in store.jobs()


def test_a_home_of_the_version_before_gets_labels_and_deletion(tmp_path):
    """A database as the version before this wrote it: rows, history and leases stay, and everything new works."""
    from sqlite_utils import Database

    from backend.jobs import database
    from backend.jobs.migrations import create_jobs, schedule_jobs

    home = Home(tmp_path / "home")
    home.private.mkdir(parents=True)
    (home.private / "store.lock").write_text(database.MADE)
    with sqlite3.connect(home.jobs_db) as db:
        for migration in (create_jobs, schedule_jobs):
            migration(Database(db))
        db.execute(
            "CREATE TABLE _sqlite_migrations (id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT)"
        )
        for name in ("create_jobs", "schedule_jobs"):
            db.execute(
                "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('jobs', ?, '')", [name]
            )
        for number, state in enumerate(("succeeded", "running")):
            at = f"2026-01-0{number + 1}T00:00:00.000+00:00"
            ended = at if state == "succeeded" else None
            values = [
                f"{number:012x}aaaaaaaaaa",
                state,
                f"x/{number}",
                state,
                demo_text(state),
                '{"a": 1}',
                at,
                at,
                ended,
            ]
            db.execute(
                "INSERT INTO jobs (uid, job_id, folder, model, algorithm, device, state, config_yaml, progress, "
                "created_at, started_at, finished_at, priority, heartbeat, outcome, time_limit_s, reason) "
                "VALUES (?, ?, ?, 'm', 'AutoAWQ', 'cpu', ?, ?, ?, ?, ?, ?, 7, 3, 'x', 9.5, 'why')",
                values,
            )
            for to in ("queued", state):
                db.execute(
                    "INSERT INTO job_events (uid, attempt, to_state, actor, at) VALUES (?, 1, ?, 'user', ?)",
                    [values[0], to, at],
                )
        db.execute("INSERT INTO leases VALUES ('cpu:0', ?, 1, '')", [values[0]])
    db.close()
    store = JobStore(home)
    assert (home.root / "jobs.db.before-label_and_delete_jobs").exists()
    job = store.get("succeeded")
    assert (job.tags, job.note, job.deleted_at, job.erased) == ((), "", None, None)
    assert (job.priority, job.heartbeat, job.outcome, job.time_limit_s, job.reason) == (7, 3, "x", 9.5, "why")
    assert job.progress == {"a": 1} and job.config_yaml == demo_text("succeeded") and len(store.history(job.uid)) == 2
    assert [lease.resource for lease in store.leases()] == ["cpu:0"] and store.check() == []
    deletion.delete(home, "succeeded")
    deletion.erase(home, job.uid)
    assert [j.job_id for j in store.jobs()] == ["running"] and store.check() == []
    with pytest.raises(JobError), store.writing() as db:
        db.execute("DELETE FROM job_events")
