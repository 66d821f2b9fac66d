"""A calibration killed anywhere goes on to the same bytes; a full disk stops it with an error that says so.

Run as a program, this file is the one that is killed: it calibrates in forked children, which kill themselves at a
chosen operation on files.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.errors import CheckpointError
from backend.formats.size import MAX_SHARD_BYTES
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm import block
from backend.quantize.aqlm.found import FILE as CODES
from backend.quantize.aqlm.found import FoundCodes
from backend.quantize.aqlm.pipeline import calibrate
from backend.quantize.aqlm.report import CalibrationReport
from backend.quantize.aqlm.workers import FitPool
from backend.quantize.checkpoint import FILE, Checkpoint
from tests.formats.crash import die_at_call, digest
from tests.quantize.aqlm.tiny import FINETUNE, HELD_OUT, SAMPLES, SCHEME, SEARCH
from tests.quantize.killed import kill_at_operation
from tests.quantize.models import make_model, tokens

ROOT = Path(__file__).parents[3]
LAYERS = 3
SHARD_BYTES = 60_000  # several shards
STEPS = {  # where a run is killed -> the layer at which the next one begins, and how many layers need their codes
    "codes:before 0": (0, 3), "codes:after 0": (0, 2), "finetune:after 0": (0, 2), "commit:after 0": (0, 2),
    "save:after 0": (1, 2), "clear:before 0": (1, 2), "codes:before 1": (1, 2), "codes:after 1": (1, 1),
    "finetune:before 2": (2, 0), "seal:before 2": (3, 0), "clear:after 2": (3, 0),
}  # fmt: skip
OWNERS: dict[str, tuple[Any, str]] = {
    "codes": (FoundCodes, "save"), "clear": (FoundCodes, "clear"), "finetune": (block, "finetune"),
    "commit": (CheckpointWriter, "commit"), "save": (Checkpoint, "save"), "seal": (CheckpointWriter, "seal"),
}  # fmt: skip


def prepare(work: Path) -> None:
    make_model(work / "source", "qwen2", num_hidden_layers=LAYERS)


def run(work: Path, shard_bytes: int = SHARD_BYTES, **changes: Any) -> CalibrationReport:
    """Calibrate in `work`, going on where an earlier run stopped."""
    writer = CheckpointWriter(
        work / "out", work / "source", layout="aqlm", dtype="float16", max_shard_bytes=shard_bytes
    )
    asked: dict[str, Any] = {
        "tokens": tokens(SAMPLES), "scheme": SCHEME, "search": SEARCH, "finetune": FINETUNE, "val_size": HELD_OUT,
        "checkpoint_dir": work / "progress", "dtype": torch.float32, **changes,
    }  # fmt: skip
    report = calibrate(work / "source", writer=writer, **asked)
    writer.finish(report.kept)
    return report


def told(report: CalibrationReport) -> list[dict[str, Any]]:
    """What is reported of the layers, without seconds."""
    return [{k: v for k, v in asdict(r).items() if not k.endswith("_s")} for r in report.layers]


# The program that is killed


def kill_in(method: str, layer: int) -> None:
    """Have this process die right before or after a step of a layer."""
    name, _, when = method.partition(":")
    owner, attribute = OWNERS[name]
    die_at_call(owner, attribute, 1 + layer, when)


def in_child(
    work: Path, before: Callable[[], Any] = lambda: None, kill_after: float | None = None
) -> tuple[int, int, int] | None:
    """Calibrate in a forked child.

    Returns:
        `resumed_at`, layers whose codes were searched, operations counted; None if it was killed.
    """
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            count, searched, fit_all = before(), [0], FitPool.fit_all

            def counted(*args: Any) -> Any:
                searched[0] += 1
                return fit_all(*args)

            FitPool.fit_all = counted  # type: ignore[method-assign]
            report = run(work)
            content = json.dumps(told(report))
            answer.write_text(json.dumps([report.resumed_at, searched[0], count[0] if count else 0, content]))
            os._exit(0)
        except BaseException as error:  # noqa: BLE001 - nothing may escape into the parent's code
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return None
    assert os.WEXITSTATUS(status) == 0, "the child failed"
    resumed_at, searched_layers, operations, _ = json.loads(answer.read_text())
    return resumed_at, searched_layers, operations


def results(work: Path) -> tuple[dict[str, str], str]:
    """Every file of the artefact as a digest, and the report."""
    return digest(work / "out"), json.loads((work / "answer.json").read_text())[3]


def main() -> None:
    """Kill at many points and report what went on differently."""
    torch.set_num_threads(1)
    work, points, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    began = time.monotonic()
    whole = in_child(work, partial(kill_at_operation, 0))
    assert whole is not None
    seconds = time.monotonic() - began
    reference = results(work)
    found: dict[str, tuple[int, int] | None] = {}
    different: list[str] = []

    def fresh() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        shutil.rmtree(work / "progress", ignore_errors=True)

    def finish(case: str) -> None:
        ended = in_child(work)
        found[case] = None if ended is None else ended[:2]
        if results(work) != reference:
            different.append(case)

    for step in STEPS:
        method, layer = step.split()
        fresh()
        assert in_child(work, partial(kill_in, method, int(layer))) is None, step
        finish(step)
    for number in range(points):
        point = 1 + number * (whole[2] - 1) // (points - 1)
        fresh()
        assert in_child(work, partial(kill_at_operation, point)) is None
        if number % 3 == 0:  # and again, while it recovers
            in_child(work, partial(kill_at_operation, 1 + point % 17))
        finish(f"operation {point}")
    chance = random.Random(0)
    for trial in range(trials):
        fresh()
        while in_child(work, kill_after=chance.uniform(0.1, 1.1) * seconds) is None:
            pass
        if results(work) != reference:
            different.append(f"trial {trial}")
    print(json.dumps({"operations": whole[2], "found": found, "different": different}))


# Tests


def test_killed_anywhere(tmp_path: Path) -> None:
    prepare(tmp_path)
    command = [sys.executable, "-m", "tests.quantize.aqlm.test_calibration_resume", str(tmp_path), "8", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["operations"] > 60
    assert {step: tuple(found["found"][step]) for step in STEPS} == STEPS
    by_operation = [at for name, (at, _) in found["found"].items() if name.startswith("operation")]
    assert by_operation == sorted(by_operation)
    assert (by_operation[0], by_operation[-1]) == (0, LAYERS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CalibrationReport]:
    """An uninterrupted run."""
    work = tmp_path_factory.mktemp("finished")
    prepare(work)
    return work, run(work, MAX_SHARD_BYTES)


class Stop(BaseException):
    """As sudden as a kill."""


def stop_in(work: Path, owner: Any, attribute: str, calls: int, **changes: Any) -> None:
    """Calibrate until a method has been called so often."""
    original, count = getattr(owner, attribute), [0]

    def stop(*args: Any) -> Any:
        result = original(*args)
        count[0] += 1
        if count[0] == calls:
            raise Stop
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(owner, attribute, stop)
        run(work, MAX_SHARD_BYTES, **changes)


@pytest.fixture
def interrupted(tmp_path: Path, finished: tuple[Path, CalibrationReport]) -> Path:
    """A run that stopped in its second layer, when the codes were found."""
    shutil.copytree(finished[0] / "source", tmp_path / "source")
    stop_in(tmp_path, FoundCodes, "save", 2)
    assert json.loads((tmp_path / "progress" / FILE).read_text())["layer"] == 1
    return tmp_path


@pytest.mark.parametrize("workers", [1, 2])
def test_a_real_process_goes_on_after_sigkill(
    tmp_path: Path, finished: tuple[Path, CalibrationReport], workers: int
) -> None:
    shutil.copytree(finished[0] / "source", tmp_path / "source")
    program = (
        "import sys, torch; from pathlib import Path; from tests.quantize.aqlm.test_calibration_resume import run\n"
        "torch.set_num_threads(1)\n"
        "tell = lambda r: print(r.name, flush=True)\n"
        f"r = run(Path(sys.argv[1]), {MAX_SHARD_BYTES}, workers={workers}, on_layer=tell)\n"
        "print('resumed', r.resumed_at)"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert first.stdout is not None
    assert first.stdout.readline() == "model.layers.0\n"  # done; perhaps its progress is saved, perhaps not
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert not (tmp_path / "out/config.json").exists()
    second = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(second.stdout.split()[-1]) <= 1
    assert digest(tmp_path / "out") == digest(finished[0] / "out")


CHANGES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "scheme": {"scheme": replace(SCHEME, num_codebooks=1)},
    "search": {"search": replace(SEARCH, warm_ups=1)},
    "epochs": {"finetune": replace(FINETUNE, max_epochs=2)},
    "no finetuning": {"finetune": None},
    "val_size": {"val_size": HELD_OUT - 1},
    "stages": {"true_sequential": True},
    "seed": {"seed": 1},
    "keep": {"keep": ("lm_head", "k_proj")},
    "tokens": {"tokens": tokens(SAMPLES, seed=2)},
    "lengths": {"lengths": torch.full((SAMPLES,), 23)},
    "weights": {},
}


@pytest.mark.parametrize("what", CHANGES)
def test_only_the_same_run_is_continued(interrupted: Path, what: str) -> None:
    changes = CHANGES[what]
    if what == "weights":
        path = interrupted / "source/model.safetensors"
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    report = run(interrupted, MAX_SHARD_BYTES, **changes)
    assert report.resumed_at == (1 if what == "nothing" else 0)
    again = run(interrupted, MAX_SHARD_BYTES, **changes)  # over a finished folder: only the last files are written
    assert again.resumed_at == LAYERS
    assert told(again) == told(report)
    found = digest(interrupted / "out")
    shutil.rmtree(interrupted / "out")
    run(interrupted, MAX_SHARD_BYTES, checkpoint_dir=None, **changes)
    assert digest(interrupted / "out") == found


@pytest.mark.parametrize("what", ["progress", "activations", "codes", "no codes", "other codes", "out"])
def test_lost_or_broken_progress(interrupted: Path, finished: tuple[Path, CalibrationReport], what: str) -> None:
    folder = interrupted / "progress"
    if what == "progress":
        (folder / FILE).write_text((folder / FILE).read_text()[:-100])
    elif what == "activations":
        os.truncate(folder / "activations-1.bin", 1000)
    elif what == "codes":
        os.truncate(folder / CODES, 1000)
    elif what == "no codes":
        (folder / CODES).unlink()
    elif what == "other codes":
        (folder / CODES).write_bytes(b"\x08" + bytes(7) + b"{}      ")
    else:
        shutil.rmtree(interrupted / "out")
        shutil.rmtree(folder)
    report = run(interrupted, MAX_SHARD_BYTES)
    assert report.resumed_at == (1 if "codes" in what else 0)
    assert digest(interrupted / "out") == digest(finished[0] / "out")
    assert told(report) == told(finished[1])


def test_stages_go_on_too(tmp_path: Path, finished: tuple[Path, CalibrationReport]) -> None:
    """With one input group after the other, the codes of the groups before are kept."""
    shutil.copytree(finished[0] / "source", tmp_path / "source")
    whole = run(tmp_path, MAX_SHARD_BYTES, true_sequential=True, checkpoint_dir=None)
    expected = digest(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    calls: list[int] = []
    fit_all = FitPool.fit_all

    def counted(self: FitPool, items: Any, *rest: Any) -> Any:
        calls.append(len(items))
        return fit_all(self, items, *rest)

    stop_in(tmp_path, FoundCodes, "save", 4 + 2, true_sequential=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitPool, "fit_all", counted)
        report = run(tmp_path, MAX_SHARD_BYTES, true_sequential=True)
    assert report.resumed_at == 1
    assert calls == [2, 1, *[3, 1, 2, 1]]  # gate and up, down; then the last layer
    assert digest(tmp_path / "out") == expected
    assert told(report) == told(whole)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writing beyond this fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


@pytest.mark.parametrize(("limit", "file"), [(12_000, "shard-00001.part"), (30_000, CODES)])
def test_a_full_disk(interrupted: Path, finished: tuple[Path, CalibrationReport], limit: int, file: str) -> None:
    if file == CODES:
        (interrupted / "progress" / CODES).unlink()
    with file_size_limit(limit), pytest.raises(CheckpointError, match=f"{file}.*and resume") as caught:
        run(interrupted, MAX_SHARD_BYTES)
    error = caught.value
    assert isinstance(error.__cause__ or error.__context__, OSError)
    assert not (interrupted / "out/config.json").exists()
    assert not list((interrupted / "progress").glob("*.tmp"))
    assert run(interrupted, MAX_SHARD_BYTES).resumed_at == 1
    assert digest(interrupted / "out") == digest(finished[0] / "out")


if __name__ == "__main__":
    main()
