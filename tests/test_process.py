"""Locks that die with their holder, children that die with their parent, trees that end whole."""

import subprocess
import sys
import time

import psutil
import pytest

from backend.paths import PROJECT
from backend.process import hold_lock, lock_is_held


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
end_tree(process, grace_s=0.5)
alive = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
print(len(alive))
"""


@pytest.mark.parametrize("prelude", ["pass", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
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
