"""The commands around jobs: lists, backups, accounts, measuring again, and their exit codes."""

from __future__ import annotations

import io
import json
import sqlite3

import pytest

from backend import accounts, cli, commands_jobs
from backend.jobs import control, launch
from backend.jobs.store import JobStore
from backend.schema import parse_yaml
from tests.conftest import demo_text

PASSWORD = "a long enough passphrase"


@pytest.fixture
def store(home, monkeypatch):
    monkeypatch.setattr(launch, "watch", lambda home: False)  # the list must not start what is queued here
    return JobStore(home)


@pytest.fixture
def run(home, capsys):
    """Runs a command; returns exit code, standard output, standard error."""

    def run(*words):
        code = cli.main([*words, "--home", str(home.root)])
        return code, *capsys.readouterr()

    return run


def create(store, name, **changes):
    text = demo_text(name, **changes)
    return store.create(text, parse_yaml(text).config, device="cpu")


def test_jobs_are_listed_newest_first_with_priority_and_why_they_wait(store, run):
    create(store, "first")
    second = create(store, "second", PRIORITY=5)
    store.wait(second.uid, 1, "waiting: 1 of 1 CPU slots are busy")
    code, out, _ = run("jobs")
    lines = out.splitlines()
    assert code == 0 and "second" in lines[0] and "+5" in lines[0] and "first" in lines[2]
    assert lines[1].strip() == "waiting: 1 of 1 CPU slots are busy"


def test_jobs_can_be_limited_by_state_and_number(store, run):
    first, *_ = [create(store, name) for name in ("first", "second", "third")]
    store.move(first.uid, "cancelled", actor="user", attempt=1)
    names = lambda *words: [job["job_id"] for job in json.loads(run("jobs", "--json", *words)[1])]  # noqa: E731
    assert names("--state", "cancelled") == ["first"]
    assert names("--state", "queued", "--limit", "1") == ["third"]
    assert names("--state", "queued", "--state", "cancelled") == ["third", "second", "first"]
    assert "no failed jobs" in run("jobs", "--state", "failed")[1]


@pytest.mark.parametrize("words", [("--limit", "0"), ("--limit", "-1"), ("--limit", "x"), ("--state", "unknown")])
def test_nonsense_is_an_error_of_the_command(run, words):
    with pytest.raises(SystemExit) as error:
        run("jobs", *words)
    assert error.value.code == 2


def test_a_backup_is_a_whole_database_of_that_moment(home, store, run, tmp_path):
    create(store, "first")
    target = tmp_path / "saved.db"
    code, out, _ = run("backup", str(target))
    assert code == 0 and str(target) in out
    create(store, "second")
    with sqlite3.connect(target) as db:
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT job_id FROM jobs").fetchall() == [("first",)]
    db.close()


def test_a_backup_overwrites_nothing_and_makes_no_folders(home, store, run, tmp_path):
    create(store, "first")
    taken = tmp_path / "taken.db"
    taken.write_text("mine")
    code, _, err = run("backup", str(taken))
    assert code == 2 and "exists" in err and taken.read_text() == "mine"
    code, _, err = run("backup", str(tmp_path / "absent" / "saved.db"))
    assert code == 2 and "no folder" in err


def test_a_home_without_jobs_has_nothing_to_back_up(home, run, tmp_path):
    code, _, err = run("backup", str(tmp_path / "saved.db"))
    assert code == 2 and "jobs.db" in err
    assert not home.jobs_db.exists() and not (tmp_path / "saved.db").exists()


def test_accounts_are_added_listed_and_removed(home, run, monkeypatch):
    assert "no accounts" in run("accounts")[1]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASSWORD}\n"))
    code, out, err = run("accounts", "add", "anna", "--password-stdin")
    assert code == 0 and PASSWORD not in out + err
    assert accounts.verify(home, "anna", PASSWORD)
    assert run("accounts", "list") == (0, "anna\n", "")
    assert run("accounts", "remove", "anna")[0] == 0
    assert accounts.names(home) == []
    assert run("accounts", "remove", "anna")[0] == 2


def test_the_home_may_stand_before_the_action(home, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASSWORD}\n"))
    assert cli.main(["accounts", "--home", str(home.root), "add", "anna", "--password-stdin"]) == 0
    assert accounts.names(home) == ["anna"]


def test_a_password_is_asked_for_twice(home, run, monkeypatch):
    given = iter([PASSWORD, "something else"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(given))
    code, _, err = run("accounts", "add", "anna")
    assert code == 2 and "differ" in err and PASSWORD not in err
    monkeypatch.setattr("getpass.getpass", lambda prompt: PASSWORD)
    assert run("accounts", "add", "anna")[0] == 0
    assert accounts.verify(home, "anna", PASSWORD)


def test_a_short_password_is_refused_without_telling_it(home, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("secret\n"))
    code, out, err = run("accounts", "add", "anna", "--password-stdin")
    assert code == 2 and "secret" not in out + err and accounts.names(home) == []


@pytest.mark.parametrize("redo", ["", "measure"])
def test_resume_says_what_is_to_be_done_again(store, run, monkeypatch, redo):
    job = create(store, "first")
    store.move(job.uid, "cancelled", actor="user", attempt=1)
    asked = []

    def resume(home, uid, redo=""):
        asked.append((uid, redo))
        return store.get(uid)

    monkeypatch.setattr(control, "resume", resume)
    monkeypatch.setattr(commands_jobs, "follow", lambda home, uid, cursor: store.get(uid))
    words = ["--redo", redo] if redo else []
    assert run("resume", "first", *words)[0] == 1  # it is cancelled, not succeeded
    assert asked == [(job.uid, redo)]


def test_an_unknown_job_is_an_error(store, run):
    code, out, err = run("cancel", "nobody")
    assert (code, out) == (1, "") and "nobody" in err
