"""A full disk is recognised however a library tells it, and its message has path, need and room."""

import errno
import os
import sqlite3
import subprocess
import sys

import pytest

from backend.disk import BALLAST_BYTES, NO_SPACE_EXIT, Ballast, DiskFullError, is_disk_full, mount_point, unwritten_path
from backend.errors import EngineError
from backend.jobs.program import Command, program_environment
from backend.paths import PROJECT


def wrapped(error: Exception) -> Exception:
    try:
        try:
            raise error
        except Exception as inner:
            raise EngineError("the writer failed") from inner
    except EngineError as outer:
        return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
        sqlite3.OperationalError("database or disk is full"),
        wrapped(OSError(errno.ENOSPC, "x")),
    ],
)
def test_a_full_disk_is_recognised(error):
    assert is_disk_full(error)


@pytest.mark.parametrize("error", [OSError(errno.EACCES, "no"), ValueError("full"), None])
def test_other_errors_are_not_taken_for_it(error):
    assert not is_disk_full(error)


def test_the_message_has_path_need_and_room(tmp_path):
    path = tmp_path / "not" / "yet"
    message = DiskFullError(path, 25_300_000).message
    assert str(path) in message and f"the disk at {mount_point(tmp_path)} " in message
    assert mount_point(tmp_path).is_mount()
    assert "up to 25.3 MB more are needed" in message and "are free" in message and "resume" in message
    assert "needed" not in DiskFullError(path).message


def test_the_file_is_named_if_any_error_of_the_chain_names_it():
    assert unwritten_path(OSError(errno.ENOSPC, "No space left on device", "/x/y.bin")) == "/x/y.bin"
    assert unwritten_path(wrapped(OSError(errno.ENOSPC, "No space", "/x/y.bin"))) == "/x/y.bin"
    assert unwritten_path(EngineError("/x/a b.bin: No space left on device after 0 bytes")) == "/x/a b.bin"
    assert unwritten_path(wrapped(OSError(errno.ENOSPC, "No space"))) == ""


def test_the_ballast_holds_real_room_and_gives_it_back(tmp_path):
    ballast = Ballast(tmp_path / "ballast")
    ballast.take()
    assert ballast.path.stat().st_blocks * 512 >= BALLAST_BYTES
    ballast.drop()
    ballast.drop()
    assert not ballast.path.exists()


def test_a_program_tells_by_its_exit_code_even_if_nothing_can_be_written(tmp_path):
    code = (
        "from backend.child import run_child\n"
        "def program(request, events): events.note(stage='x', message='y' * 100)\n"
        "run_child(program)"
    )
    (tmp_path / "request.json").write_text("{}")
    command = [sys.executable, "-c", code, str(tmp_path / "request.json"), str(tmp_path / "result.json")]
    with open("/dev/full", "wb") as full:
        finished = subprocess.run(command, cwd=PROJECT, stdout=full, stderr=subprocess.DEVNULL, check=False)
    assert finished.returncode == NO_SPACE_EXIT
    assert not (tmp_path / "result.json").exists()


def test_a_program_sees_an_allow_list_of_our_variables(monkeypatch):
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME", "LD_LIBRARY_PATH", "LD_PRELOAD", "HF_TOKEN", "MY_SECRET"):
        monkeypatch.setenv(name, "/ours")
    monkeypatch.setenv("DOCKER_AUTH_CONFIG", "/ours")
    monkeypatch.setenv("DOCKER_HOST", "unix:///run/user/1000/docker.sock")
    monkeypatch.setenv("QUANTDECK_JOB", "u:1")
    device = {"CUDA_VISIBLE_DEVICES": "GPU-1"}
    commands = [
        Command(("python", "-m", "x"), environment, token)
        for environment, token in ((None, False), ("autoawq", False), (None, True))
    ]
    ours, theirs, download = (program_environment(command, device) for command in commands)
    assert "/ours" not in ours.values() and "/ours" not in theirs.values()
    assert {k for k, v in download.items() if v == "/ours"} == {"HF_TOKEN"}
    assert "DOCKER_HOST" in ours and "DOCKER_HOST" not in theirs
    for environment in (ours, theirs, download):
        assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1" and environment["QUANTDECK_JOB"] == "u:1"
        assert environment["QUANTDECK_PARENT_PID"] == str(os.getpid()) and environment["PATH"]
