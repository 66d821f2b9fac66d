"""A quantization killed anywhere goes on to the same bytes; a full disk stops it with an error that says so.

Run as a program, this file is the one that is killed: it runs the native engine in forked children, which kill
themselves at a chosen operation on files.
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
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.engines import native
from backend.errors import CheckpointError
from backend.event_stream import EventWriter
from backend.formats.size import MAX_SHARD_BYTES
from backend.formats.writer import CheckpointWriter
from backend.quantize.checkpoint import FILE, Checkpoint
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.crash import die_at_call, digest
from tests.quantize.killed import kill_at_operation
from tests.quantize.tiny import make_model, recipe, tokens

ROOT = Path(__file__).parents[2]
LAYERS = 4
SHARD_BYTES = 60_000  # several shards per configuration
STEPS = {  # where a run is killed -> the layer at which the next one begins
    "commit:after 0": 0, "seal:before 0": 1, "save:before 1": 1, "save:after 1": 2, "commit:after 2": 2,
    "seal:after 2": 3, "seal:after 3": 4,
}  # fmt: skip
CONFIGURATIONS = [
    (recipe("AWQ", 4, scale_grid=4, clip=False), "autoawq-gemm", "float16"),
    (
        Recipe(
            "mixed",
            Scheme("AWQ+GPTQ", 3, -1),
            overrides=(Override("*.2.self_attn.*", None),),
            keep=("up_proj",),
            clip=False,
        ),
        "compressed-tensors",
        None,
    ),
]


def request(work: Path, **changes: Any) -> dict[str, Any]:
    configurations = [
        {"name": r.name, "label": r.name, "recipe": r.to_dict(), "layout": layout, "dtype": dtype}
        for r, layout, dtype in CONFIGURATIONS
    ]
    return {
        "model_dir": str(work / "source"),
        "tokens_file": str(work / "tokens.safetensors"),
        "out_dir": str(work / "out"),
        "device": "cpu",
        "checkpoint_dir": str(work / "checkpoint"),
        "seed": 0,
        "configurations": configurations,
        **changes,
    }


def prepare(work: Path, seed: int = 1, length: int = 24) -> None:
    """A model and calibration tokens."""
    if not (work / "source").is_dir():
        make_model(work / "source", num_hidden_layers=LAYERS)
    save_file({"tokens": tokens(6, length, seed)}, work / "tokens.safetensors")


def results(out: Path) -> dict[str, dict[str, str]]:
    """Every file of every configuration, as a digest."""
    return {folder.name: digest(folder) for folder in sorted(out.iterdir())}


def quantize(asked: dict[str, Any], shard_bytes: int = SHARD_BYTES) -> dict[str, Any]:
    """The engine in this process."""
    defaults: Any = CheckpointWriter.__init__.__kwdefaults__
    with pytest.MonkeyPatch.context() as patch, open(os.devnull, "w") as sink:
        patch.setitem(defaults, "max_shard_bytes", shard_bytes)
        return native.quantize(asked, EventWriter(sink))


# The program that is killed


def kill_in(method: str, layer: int) -> None:
    """Have this process die right before or after a step of a layer: `commit`, `save` (of progress) or `seal`."""
    owner: Any = Checkpoint if method.startswith("save") else CheckpointWriter
    name, _, when = method.partition(":")
    per_layer = 1 if name == "save" else len(CONFIGURATIONS)
    die_at_call(owner, name, 1 + layer * per_layer, when)


def in_child(work: Path, before: Callable[[], Any] = lambda: None, kill_after: float | None = None) -> int | None:
    """Quantize in a forked child; returns `resumed_at`, or None if it was killed."""
    answer = work / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        try:
            count = before()
            result = quantize(request(work))
            answer.write_text(json.dumps([result["resumed_at"], count[0] if count else 0]))
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
    return int(json.loads(answer.read_text())[0])


def main() -> None:
    """Kill at many points and report what went on differently."""
    torch.set_num_threads(1)
    work, points, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    began = time.monotonic()
    assert in_child(work, partial(kill_at_operation, 0)) == 0
    seconds = time.monotonic() - began
    operations = json.loads((work / "answer.json").read_text())[1]
    reference = results(work / "out")
    resumed: dict[str, int | None] = {}
    different: list[str] = []

    def fresh() -> None:
        shutil.rmtree(work / "out", ignore_errors=True)
        shutil.rmtree(work / "checkpoint", ignore_errors=True)

    def finish(case: str) -> None:
        resumed[case] = in_child(work)
        if results(work / "out") != reference:
            different.append(case)

    for step in STEPS:
        method, layer = step.split()
        fresh()
        assert in_child(work, partial(kill_in, method, int(layer))) is None
        finish(step)
    for number in range(points):
        point = 1 + number * (operations - 1) // (points - 1)
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
        if results(work / "out") != reference:
            different.append(f"trial {trial}")
    print(json.dumps({"operations": operations, "resumed": resumed, "different": different}))


# Tests


def test_killed_anywhere(tmp_path: Path) -> None:
    prepare(tmp_path)
    command = [sys.executable, "-m", "tests.quantize.test_resume", str(tmp_path), "8", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["operations"] > 100
    assert {step: found["resumed"][step] for step in STEPS} == STEPS
    by_operation = [at for name, at in found["resumed"].items() if name.startswith("operation")]
    assert by_operation == sorted(by_operation)
    assert by_operation[0] == 0
    assert by_operation[-1] == LAYERS


def start(work: Path) -> subprocess.Popen[str]:
    """The engine as the runner starts it."""
    (work / "request.json").write_text(json.dumps(request(work)))
    command = [sys.executable, "-m", "backend.engines.native", str(work / "request.json"), str(work / "result.json")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with shards of the usual size."""
    work = tmp_path_factory.mktemp("finished")
    prepare(work)
    (work / "result.json").write_text(json.dumps(quantize(request(work), MAX_SHARD_BYTES)))
    return work


def take_over(work: Path, finished: Path) -> None:
    """The same model and tokens as in the finished run."""
    shutil.copytree(finished / "source", work / "source")
    shutil.copy(finished / "tokens.safetensors", work)


def test_the_program_goes_on_after_sigkill(tmp_path: Path, finished: Path) -> None:
    take_over(tmp_path, finished)
    process = start(tmp_path)
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("step") == 2 and event["configuration"] == CONFIGURATIONS[1][0].name:
            break  # layer 1 is done; perhaps its progress is saved, perhaps not
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "result.json").exists()
    assert not list((tmp_path / "out").glob("*/config.json"))
    second = start(tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 0, out + err
    result, whole = (json.loads((work / "result.json").read_text()) for work in (tmp_path, finished))
    assert result["resumed_at"] >= 1
    assert whole["resumed_at"] == 0
    assert results(tmp_path / "out") == results(finished / "out")
    assert result["results"] == whole["results"]  # with the reports of the layers before the kill
    assert [len(r["layers"]) for r in result["results"]] == [LAYERS, LAYERS]
    steps = [e["step"] for e in map(json.loads, out.splitlines()) if e["stage"] == "quantize" and "step" in e]
    assert steps[0] == result["resumed_at"] + 1


class Stop(BaseException):
    """As sudden as a kill."""


def stop_at(asked: dict[str, Any], layer: int, *, saved: bool) -> None:
    """Quantize until the progress of `layer` layers has been, or is about to be, recorded."""
    save = Checkpoint.save

    def stop(self: Checkpoint, done: int, *rest: Any) -> None:
        if done < layer or saved:
            save(self, done, *rest)
        if done == layer:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Checkpoint, "save", stop)
        quantize(asked)


@pytest.fixture
def interrupted(tmp_path: Path, finished: Path) -> Path:
    """A run that stopped after its second layer."""
    take_over(tmp_path, finished)
    stop_at(request(tmp_path), 2, saved=True)
    assert json.loads((tmp_path / "checkpoint" / FILE).read_text())["layer"] == 2
    return tmp_path


def test_it_goes_on_where_nothing_changed(interrupted: Path) -> None:
    assert quantize(request(interrupted))["resumed_at"] == 2
    again = quantize(request(interrupted))  # over a finished folder: only the last files are written
    assert again["resumed_at"] == LAYERS


@pytest.mark.parametrize("what", ["recipe", "damp", "tokens", "fewer tokens", "lengths", "weights", "order"])
def test_changed_inputs_start_over(interrupted: Path, what: str) -> None:
    asked = request(interrupted)
    if what == "recipe":
        asked["configurations"][0]["recipe"]["scheme"]["symmetric"] = True
    elif what == "damp":
        asked["configurations"][1]["recipe"]["damp"] = 0.02
    elif what == "tokens":
        prepare(interrupted, seed=2)
    elif what == "fewer tokens":
        prepare(interrupted, length=20)
    elif what == "lengths":
        save_file({"tokens": tokens(), "lengths": torch.full((6,), 23)}, interrupted / "tokens.safetensors")
    elif what == "weights":
        path = interrupted / "source/model.safetensors"
        os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    else:
        asked["configurations"].reverse()
    assert quantize(asked)["resumed_at"] == 0
    clean = interrupted / "clean"
    assert quantize({**asked, "out_dir": str(clean), "checkpoint_dir": None})["resumed_at"] == 0
    assert results(clean) == results(interrupted / "out")


@pytest.mark.parametrize("length", [20, 30])
def test_a_run_that_started_over_can_be_resumed_too(interrupted: Path, length: int) -> None:
    """Activations that the first run left, of another size, are not in the way."""
    prepare(interrupted, length=length)
    assert quantize(request(interrupted))["resumed_at"] == 0
    assert quantize(request(interrupted))["resumed_at"] == LAYERS


def test_back_to_the_first_recipe(tmp_path: Path, finished: Path) -> None:
    """Another recipe or other tokens left files of the same sizes, and died before it could record its progress."""
    take_over(tmp_path, finished)
    clean = tmp_path / "clean"
    quantize({**request(tmp_path), "out_dir": str(clean), "checkpoint_dir": None})
    for what in ("recipe", "tokens"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        shutil.rmtree(tmp_path / "checkpoint", ignore_errors=True)
        prepare(tmp_path)
        stop_at(request(tmp_path), 1, saved=True)
        other = request(tmp_path)
        if what == "recipe":
            other["configurations"][1]["recipe"]["damp"] = 0.5
        else:
            prepare(tmp_path, seed=2)
        stop_at(other, 1, saved=False)
        prepare(tmp_path)
        quantize(request(tmp_path))
        assert results(tmp_path / "out") == results(clean), what


@pytest.mark.parametrize("what", ["progress", "activations", "no activations", "out"])
def test_lost_or_broken_progress_starts_over(interrupted: Path, finished: Path, what: str) -> None:
    folder = interrupted / "checkpoint"
    if what == "progress":
        (folder / FILE).write_text((folder / FILE).read_text()[:-100])
    elif what == "activations":
        os.truncate(folder / "activations-0.bin", 1000)
    elif what == "no activations":
        (folder / "activations-0.bin").unlink()
    else:
        shutil.rmtree(interrupted / "out" / CONFIGURATIONS[0][0].name)
    assert quantize(request(interrupted))["resumed_at"] == 0
    clean = interrupted / "clean"
    quantize({**request(interrupted), "out_dir": str(clean), "checkpoint_dir": None})
    assert results(clean) == results(interrupted / "out")


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writing beyond this fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_full_disk(tmp_path: Path, finished: Path) -> None:
    take_over(tmp_path, finished)
    largest = max(p.stat().st_size for p in (finished / "out").rglob("model.safetensors"))
    with (
        file_size_limit(largest * 2 // 3),
        pytest.raises(CheckpointError, match=r"shard-00001.part.*MiB of its disk are free.*and resume") as caught,
    ):
        quantize(request(tmp_path), MAX_SHARD_BYTES)
    assert isinstance(caught.value.__cause__, OSError)
    assert not list((tmp_path / "out").glob("*/config.json"))
    again = quantize(request(tmp_path), MAX_SHARD_BYTES)
    assert 0 < again["resumed_at"] < LAYERS
    assert results(tmp_path / "out") == results(finished / "out")


def test_no_room_for_activations(interrupted: Path) -> None:
    """They are larger than all else here."""
    save_file({"tokens": tokens(60, 120)}, interrupted / "tokens.safetensors")
    with (
        file_size_limit(60 * 120 * 64 * 2 * 9 // 10),
        pytest.raises(CheckpointError, match=r"activations-1.bin: .* of \d+ bytes of activations; free some space"),
    ):
        quantize(request(interrupted))


def test_no_room_for_the_record_of_progress(interrupted: Path, finished: Path) -> None:
    """Its temporary file cannot be written; the record of the layer before stays."""
    before = (interrupted / "checkpoint" / FILE).read_text()

    def full(self: Checkpoint, *rest: Any) -> None:
        with file_size_limit(1000):
            save(self, *rest)

    save = Checkpoint.save
    with pytest.MonkeyPatch.context() as patch, pytest.raises(CheckpointError, match=FILE):
        patch.setattr(Checkpoint, "save", full)
        quantize(request(interrupted))
    assert (interrupted / "checkpoint" / FILE).read_text() == before
    assert quantize(request(interrupted))["resumed_at"] == 2


if __name__ == "__main__":
    main()
