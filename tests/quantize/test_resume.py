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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from backend.engines import native
from backend.event_stream import EventWriter
from backend.formats.writer import CheckpointWriter
from backend.quantize.checkpoint import FILE, Checkpoint
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.crash import digest
from tests.quantize.tiny import make_model, recipe, tokens

ROOT = Path(__file__).parents[2]
LAYERS = 4
SHARD_BYTES = 60_000  # several shards per configuration
OPERATIONS = ("pwrite", "fsync", "replace", "unlink", "truncate", "open")
CONFIGURATIONS = [
    (recipe("AWQ", 4), "autoawq-gemm", "float16"),
    (
        Recipe("mixed", Scheme("GPTQ", 3, -1), overrides=(Override("*.2.self_attn.*", None),), keep=("up_proj",)),
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


def quantize(asked: dict[str, Any]) -> dict[str, Any]:
    """The engine with small shards, in this process."""
    CheckpointWriter.__init__.__kwdefaults__["max_shard_bytes"] = SHARD_BYTES
    torch.set_num_threads(1)
    with open(os.devnull, "w") as sink:
        return native.quantize(asked, EventWriter(sink))


# The program that is killed


def kill_at_operation(number: int) -> list[int]:
    """Have this process die in an operation on files (0: never); counts them."""
    count = [0]
    for name in OPERATIONS:
        original = getattr(os, name)

        def operation(*args: Any, _name: str = name, _original: Any = original, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] == number:
                if _name == "pwrite":
                    _original(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return None if _name == "fsync" else _original(*args, **kwargs)  # fsync is slow and no matter here

        setattr(os, name, operation)
    return count


def kill_in(method: str, layer: int) -> None:
    """Have this process die right before or after a step of a layer: `commit`, `save` (of progress) or `seal`."""
    owner: Any = Checkpoint if method.startswith("save") else CheckpointWriter
    name, _, when = method.partition(":")
    original, calls = getattr(owner, name), [0]
    per_layer = 1 if name == "save" else len(CONFIGURATIONS)

    def step(*args: Any) -> Any:
        calls[0] += 1
        dies = calls[0] == 1 + layer * per_layer
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, step)


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
    work, points, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    began = time.monotonic()
    assert in_child(work, lambda: kill_at_operation(0)) == 0
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

    for layer in range(LAYERS):
        for method in ("commit:after", "save:before", "save:after", "seal:before", "seal:after"):
            if method != "commit:after" and (layer + len(method)) % 2:  # half of them do
                continue
            fresh()
            assert in_child(work, lambda m=method, i=layer: kill_in(m, i)) is None
            finish(f"{method} {layer}")
    for number in range(points):
        point = 1 + number * (operations - 1) // (points - 1)
        fresh()
        assert in_child(work, lambda n=point: kill_at_operation(n)) is None
        if number % 3 == 0:  # and again, while it recovers
            in_child(work, lambda n=1 + point % 17: kill_at_operation(n))
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
    command = [sys.executable, "-m", "tests.quantize.test_resume", str(tmp_path), "12", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["different"] == []
    assert found["operations"] > 100
    for layer in range(LAYERS):
        assert found["resumed"][f"commit:after {layer}"] == layer  # its progress was not saved yet
        for method in ("save:after", "seal:before", "seal:after"):
            assert found["resumed"].get(f"{method} {layer}", layer + 1) == layer + 1
    assert sum(name.startswith("seal:after") for name in found["resumed"]) == 2
    by_operation = [at for name, at in found["resumed"].items() if name.startswith("operation")]
    assert by_operation == sorted(by_operation)
    assert by_operation[0] == 0
    assert by_operation[-1] == LAYERS


def start(work: Path, **options: Any) -> subprocess.Popen[str]:
    """The engine as the runner starts it."""
    (work / "request.json").write_text(json.dumps(request(work)))
    command = [sys.executable, "-m", "backend.engines.native", str(work / "request.json"), str(work / "result.json")]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the program."""
    work = tmp_path_factory.mktemp("finished")
    prepare(work)
    process = start(work)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
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


@pytest.fixture
def interrupted(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that stopped after its second layer."""
    take_over(tmp_path, finished)
    monkeypatch.setitem(CheckpointWriter.__init__.__kwdefaults__, "max_shard_bytes", SHARD_BYTES)
    save = Checkpoint.save

    def stop(self: Checkpoint, layer: int, *rest: Any) -> None:
        save(self, layer, *rest)
        if layer == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", stop)
        quantize(request(tmp_path))
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


def test_a_full_disk(tmp_path: Path, finished: Path) -> None:
    """A limit on the size of files stands for the disk: the first shard of the second configuration hits it."""
    take_over(tmp_path, finished)
    largest = max(p.stat().st_size for p in (finished / "out").rglob("model.safetensors"))

    def limit() -> None:
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest * 2 // 3, hard))

    process = start(tmp_path, preexec_fn=limit)
    out, _ = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    last = json.loads(out.splitlines()[-1])
    assert last["stage"] == "error"
    assert last["kind"] == "CheckpointError"
    assert "shard-00001" in last["message"]
    assert "resume" in last["message"]
    assert not list((tmp_path / "out").glob("*/config.json"))
    process = start(tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert json.loads((tmp_path / "result.json").read_text())["resumed_at"] > 0
    assert results(tmp_path / "out") == results(finished / "out")


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_no_room_for_progress(tmp_path: Path, finished: Path, share: float) -> None:
    """The activations are larger than all else here."""
    take_over(tmp_path, finished)
    save_file({"tokens": tokens(60, 120)}, tmp_path / "tokens.safetensors")
    nbytes = 60 * 120 * 64 * 2
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(nbytes * share), old[1]))
    try:
        process = start(tmp_path)
        out, _ = process.communicate(timeout=120)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    last = json.loads(out.splitlines()[-1])
    assert process.returncode != 0
    assert last["kind"] == "CheckpointError"
    assert "activations-1.bin" in last["message"]
    assert "resume" in last["message"]


if __name__ == "__main__":
    main()
