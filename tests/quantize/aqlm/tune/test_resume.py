"""A tuning killed anywhere goes on to the same bytes.

Run as a program, this file is the one that is killed: it tunes in forked children, which kill themselves after a chosen
step, or at a chosen operation on files.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.quantize.aqlm.tune.progress import FILE
from backend.quantize.aqlm.tune.report import StepReport
from tests.formats.crash import digest
from tests.quantize.aqlm.tune.tiny import quantized, trained, tuned

ROOT = Path(__file__).parents[4]
OPERATIONS = ("fsync", "replace", "unlink")
SETTINGS: dict[str, Any] = {"max_epochs": 2, "code_lr": 0.1, "code_beta1": 0.5, "amsgrad": True, "p_only_epochs": 1}
STEPS = {1: 0, 4: 3, 5: 4, 8: 6, 9: 8, 11: 9, 12: 9}  # killed after a step -> the step at which the next one begins


def attempt(work: Path, on_step: Callable[[StepReport], None] = lambda step: None) -> int:
    """Tune, and go on with what is there; returns where it began."""
    report = tuned(
        work / "base", work / "start", work / "out", checkpoint_dir=work / "checkpoint", on_step=on_step, **SETTINGS
    )
    return report.resumed_at


def in_child(work: Path, *, step: int | None = None, operation: int | None = None) -> int | None:
    """Tune in a forked child; returns where it began, or None if it was killed."""
    answer = work / "answer.json"
    child = os.fork()
    if child == 0:
        try:
            count = kill_at_operation(operation or 0)

            def on_step(report: StepReport) -> None:
                if report.step == step:
                    os.kill(os.getpid(), signal.SIGKILL)

            began = attempt(work, on_step)
            answer.write_text(json.dumps([began, count[0]]))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - nothing may escape into the parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    return int(json.loads(answer.read_text())[0])


def kill_at_operation(number: int) -> list[int]:
    """Have this process die in an operation on files (0: never); counts them."""
    count = [0]
    for name in OPERATIONS:
        original = getattr(os, name)

        def operation(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return None if _name == "fsync" else _original(*args, **kwargs)  # fsync is slow and no matter here

        setattr(os, name, operation)
    return count


def main() -> None:
    """Kill at many points and report what went on differently."""
    torch.set_num_threads(1)
    work, points = Path(sys.argv[1]), int(sys.argv[2])
    assert in_child(work) == 0
    operations = json.loads((work / "answer.json").read_text())[1]
    reference = digest(work / "out")
    found: dict[str, Any] = {"operations": operations, "steps": {}, "points": {}, "different": []}

    def fresh() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        shutil.rmtree(work / "checkpoint", ignore_errors=True)

    def finish(kind: str, case: int) -> None:
        found[kind][str(case)] = in_child(work)
        if digest(work / "out") != reference:
            found["different"].append(f"{kind} {case}")

    for step in STEPS:
        fresh()
        assert in_child(work, step=step) is None
        finish("steps", step)
    for number in range(points):
        point = 1 + number * (operations - 1) // (points - 1)
        fresh()
        assert in_child(work, operation=point) is None
        if number % 2:  # and again, while it recovers
            in_child(work, operation=1 + point % 7)
        finish("points", point)
    print(json.dumps(found))


def test_killed_anywhere(tmp_path: Path) -> None:
    quantized(trained(tmp_path / "base"), tmp_path / "start")
    command = [sys.executable, "-m", "tests.quantize.aqlm.tune.test_resume", str(tmp_path), "7"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert {int(step): began for step, began in found["steps"].items()} == STEPS
    assert found["operations"] > 30
    began = list(found["points"].values())
    assert began == sorted(began)
    assert (began[0], began[-1]) == (0, 12)


def test_progress_of_another_run_is_not_continued(base: Path, start: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_epochs": 1, "checkpoint_dir": tmp_path / "checkpoint"}
    first = tuned(base, start, tmp_path / "out", **options)
    again = tuned(base, start, tmp_path / "out", **options)
    assert (first.resumed_at, again.resumed_at) == (0, 6)
    assert (again.losses, again.validation, again.best_step) == (first.losses, first.validation, first.best_step)
    other = tuned(base, start, tmp_path / "out", **options, seed=1)
    assert other.resumed_at == 0
    names = {path.name for path in (tmp_path / "checkpoint").iterdir() if path.is_file()}
    assert names == {FILE, f"best-{other.best_step}.safetensors"}


def test_a_stop_on_request_loses_no_saved_step(base: Path, start: Path, tmp_path: Path) -> None:
    def interrupt(report: StepReport) -> None:
        if report.step == 8:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"checkpoint_dir": tmp_path / "checkpoint", "max_epochs": 2}
    with pytest.raises(KeyboardInterrupt):
        tuned(base, start, tmp_path / "out", on_step=interrupt, **options)
    assert tuned(base, start, tmp_path / "out", **options).resumed_at == 6
    tuned(base, start, tmp_path / "whole", max_epochs=2)
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


if __name__ == "__main__":
    main()
