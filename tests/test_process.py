"""Locks that die with their holder, children that die with their parent, trees that end whole."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from backend.paths import PROJECT
from backend.process import (
    boot_id,
    end_leftovers,
    hold_lock,
    is_that_process,
    lock_is_held,
    process_facts,
    processes_of,
    start_ticks,
)


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)


def start(code, *args, **more):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=PROJECT, **more)


def test_a_lock_is_held_until_its_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom backend.process import hold_lock\n"
        "with hold_lock(Path(sys.argv[1])): time.sleep(600)"
    )
    assert not lock_is_held(path)
    holder = start(code, path)
    until(lambda: lock_is_held(path))
    with hold_lock(path, wait_s=0.2) as lock:
        assert lock is None
    holder.kill()
    holder.wait()
    assert not lock_is_held(path)
    with hold_lock(path) as lock:
        assert lock is not None


def test_a_child_dies_when_its_parent_is_killed(tmp_path):
    child = (
        "import os, sys, time; from backend.process import die_with_parent; die_with_parent(int(sys.argv[1]));"
        "open(sys.argv[2], 'w').write(str(os.getpid())); time.sleep(600)"
    )
    arguments = f"[sys.executable, '-c', {child!r}, str(os.getpid()), sys.argv[1]]"
    parent = f"import os, subprocess, sys; subprocess.Popen({arguments}).wait()"
    note = tmp_path / "pid"
    process = start(parent, note)
    until(lambda: note.exists() and note.read_text())
    pid = int(note.read_text())
    process.kill()
    process.wait()
    until(lambda: not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)


def test_a_child_whose_parent_is_already_gone_ends_at_once():
    code = "from backend.process import die_with_parent; die_with_parent(1 << 22); print('went on')"
    finished = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, check=False)
    assert finished.returncode == 1 and finished.stdout == b""


RUNNER = """
import subprocess, sys, time
from pathlib import Path
import psutil
from backend.process import adopt_orphans, end_tree
adopt_orphans()
process = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
while not (Path(sys.argv[2]).exists() and Path(sys.argv[2]).read_text()):
    time.sleep(0.05)
end_tree(process, grace_s=(0.5, 0.5))
alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
print(len(alive))
"""


IGNORE = "signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)"


@pytest.mark.parametrize("prelude", ["pass", IGNORE])
def test_a_tree_ends_whole_even_if_it_ignores_signals_and_leaves_the_group(tmp_path, prelude):
    note = tmp_path / "pid"
    grandchild = (
        f"import os, signal, time; {prelude}; os.setsid();"
        f"open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    )
    child = (
        f"import signal, subprocess, sys; {prelude}; subprocess.Popen([sys.executable, '-c', {grandchild!r}]).wait()"
    )
    finished = subprocess.run(
        [sys.executable, "-c", RUNNER, child, str(note)],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert finished.stdout.strip() == "0"
    pid = int(note.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_processes_of_a_job_are_found_by_their_environment_and_ended(tmp_path):
    note = tmp_path / "pid"
    daemon = f"import os, time; os.setsid(); open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {daemon!r}]); time.sleep(600)"
    job = start(parent, env={**os.environ, "QUANTDECK_JOB": "u1:1"}, start_new_session=True)
    others = [
        start("import time; time.sleep(600)", env={**os.environ, "QUANTDECK_JOB": "u11:1"}),
        start("import time; time.sleep(600)", env={**os.environ, "NOT_QUANTDECK_JOB": "u1:1"}),
        start("import time; time.sleep(600)", "QUANTDECK_JOB=u1:1"),
    ]
    try:
        until(lambda: note.exists() and note.read_text())
        pids = {job.pid, int(note.read_text())}
        until(lambda: {p.pid for p in processes_of("u1")} == pids)
        job.kill()  # its daemon now has another parent
        job.wait()
        assert {p.pid for p in processes_of("u1")} == pids - {job.pid}
        assert end_leftovers("u1") == [] and processes_of("u1") == []
        assert start_ticks(int(note.read_text())) is None
        assert all(other.poll() is None for other in others)
    finally:
        for process in (job, *others):
            process.kill()
            process.wait()
        end_leftovers("u1")


def test_a_process_that_ends_its_leftovers_stays():
    code = (
        "import subprocess; from backend.process import end_leftovers, is_that_process, process_facts;"
        "child = subprocess.Popen(['sleep', '600']);"
        "print(end_leftovers('u2'), is_that_process(process_facts(child.pid)))"
    )
    environment = {**os.environ, "QUANTDECK_JOB": "u2:1"}
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=PROJECT, env=environment, capture_output=True, text=True, check=True
    )
    assert finished.stdout.split() == ["[]", "False"]


def test_a_process_is_told_from_another_of_its_pid():
    process = start("import time; time.sleep(600)")
    facts = process_facts(process.pid)
    assert is_that_process(facts) and facts["boot_id"] == boot_id() and facts["started"] > 0
    assert not is_that_process({**facts, "started": facts["started"] - 1})
    assert not is_that_process({**facts, "boot_id": "before the restart"})
    process.kill()
    until(lambda: not is_that_process(facts))  # a zombie, not waited for yet, counts as ended
    process.wait()
    assert not is_that_process(facts) and process_facts(process.pid)["started"] is None
    assert process_facts()["pid"] == os.getpid() and is_that_process(process_facts())
