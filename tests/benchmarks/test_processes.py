"""What a measured process costs is what it and its children really did."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from backend.paths import PROJECT
from benchmarks.processes import ONE_THREAD, ProgramError, call, run

SPIN = "import time\nend = time.process_time() + {}\nwhile time.process_time() < end: pass\n"
CHILD = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', {!r}], check=True)\n"


def script(folder: Path, text: str) -> Path:
    path = folder / "program.py"
    path.write_text(text, encoding="utf-8")
    return path


def test_counts_the_cpu_seconds_of_children(tmp_path: Path) -> None:
    program = script(tmp_path, SPIN.format(0.3) + CHILD.format(SPIN.format(0.5)))
    usage = run([sys.executable, program], log=tmp_path / "log", limit_s=60, environment=ONE_THREAD)
    assert usage.exit_code == 0
    assert 0.8 <= usage.cpu_s < 3


def test_counts_the_largest_memory(tmp_path: Path) -> None:
    """Measured from a small process: this one holds torch, which the kernel would count."""
    program = script(tmp_path, "block = b'x' * 150_000_000\ndel block\n")
    code = (
        "import sys; from pathlib import Path; from benchmarks.processes import run\n"
        "print(run(sys.argv[1:], log=Path('/dev/null'), limit_s=60, environment={}).peak_bytes)"
    )
    command = [sys.executable, "-c", code, sys.executable, str(program)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    assert 150e6 < int(done.stdout) < 250e6


def test_a_program_gets_one_thread_and_gives_its_result(tmp_path: Path) -> None:
    program = script(
        tmp_path,
        "import json, os, sys\nasked = json.load(open(sys.argv[1]))\n"
        "json.dump([asked, os.environ['OMP_NUM_THREADS']], open(sys.argv[2], 'w'))\n",
    )
    result, _ = call(program, {"a": 1}, tmp_path / "run")
    assert result == [{"a": 1}, "1"]


def test_a_failure_tells_the_last_line_of_the_log(tmp_path: Path) -> None:
    program = script(tmp_path, "print('first')\nraise SystemExit('no such method')\n")
    with pytest.raises(ProgramError, match="exit code 1: no such method"):
        call(program, {}, tmp_path / "run")


def test_a_program_that_hangs_is_killed_with_its_children(tmp_path: Path) -> None:
    program = script(tmp_path, CHILD.format("import time; time.sleep(60)"))
    with pytest.raises(ProgramError, match="not finished after 1 s"):
        call(program, {}, tmp_path / "run", limit_s=1.0)


@pytest.mark.parametrize("command", ["quantizers", "memory", "configurations"])
def test_commands_that_measure_import_no_torch(command: str) -> None:
    code = f"import sys, benchmarks.{command}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=False).returncode == 0
