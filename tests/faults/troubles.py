"""Small disks, processes that should be gone: what several tests of faults need."""

from __future__ import annotations

import contextlib
import os
import subprocess

import psutil
import pytest

from tests.jobs.harness import until


def is_gone(process):
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def leaked(jobs, job):
    """The daemon that the engine has left behind."""
    note = jobs.home.run_dir(job.uid) / "leaked"
    until(lambda: note.exists() and note.read_text())
    return psutil.Process(int(note.read_text()))


@contextlib.contextmanager
def small_disk(folder, size):
    """A file system of its own, which can be filled without harm."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system can be mounted by root only")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def fill(path, leave=0):
    """Fill the disk of a file up to its last byte, or leave some."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    if leave:
        os.truncate(path, path.stat().st_size - leave)
