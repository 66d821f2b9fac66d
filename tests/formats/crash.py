"""Writes a checkpoint again and again in processes that are killed, and compares what comes out; run as a program.

    python -m tests.formats.crash SOURCE WORK_FOLDER LAYOUT STRIDE

Every STRIDE-th operation on files is one to be killed in. Children are forked, so that none has to import torch again.
Prints {"points", "kills", "different", "files"} as JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from backend.files import write_json
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.scheme import AdditiveScheme
from tests.formats.additive import random_additive
from tests.formats.models import random_weight

SHARD = 3000
STEPS = 6
TRIALS = 6


def job(source: Path, out: Path, state_file: Path, layout: str) -> None:
    """A quantization with a commit per layer that goes on where the saved state says."""
    writer = CheckpointWriter(out, source, layout=layout, max_shard_bytes=SHARD)
    done = 0
    if state_file.is_file():
        state = json.loads(state_file.read_text())
        writer.restore(state["writer"])
        done = state["done"]
    for step in range(done, STEPS):
        writer.add(f"model.layers.{step}.norm.weight", torch.full((100 + step,), float(step)))
        if step % 3 != 1 and layout == "aqlm":
            weight = random_additive(16, 96, AdditiveScheme(2, 4, 8), seed=step)
            writer.add_additive(f"model.layers.{step}.fc", weight, torch.full((16,), 0.5))
        elif step % 3 != 1:
            writer.add_linear(f"model.layers.{step}.fc", random_weight(16, 96, 32), torch.full((16,), 0.5))
        writer.add(f"model.layers.{step}.other", torch.full((7,), step, dtype=torch.int8))
        write_json(state_file, {"done": step + 1, "writer": writer.commit()})
        writer.seal()
    writer.add("last", torch.ones(500))  # after the last commit
    writer.finish({})


def die_at_call(owner: Any, attribute: str, number: int, when: str) -> None:
    """Have this process die right before (`before`) or after a call of a method, the one of that number, from 1."""
    original, calls = getattr(owner, attribute), [0]

    def step(*args: Any) -> Any:
        calls[0] += 1
        dies = calls[0] == number
        if dies and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args)
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, step)


def run(work: Callable[[], None], kill_at: int | None = None, kill_after: float | None = None) -> bool:
    """Fork a child that works; true if it came to its end.

    Args:
        work: What it does.
        kill_at: The number of the file operation in which it kills itself, half done if that is possible.
        kill_after: Seconds after which it is killed.
    """
    child = os.fork()
    if child == 0:
        try:
            count_operations(kill_at)
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the child failed")
    return os.WIFEXITED(status)


def count_operations(kill_at: int | None) -> None:
    """Have this process die in its `kill_at`-th operation on files; with -1, write the count to a file `count`."""
    counter = [0]

    def wrap(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def operation(*args: object, **kwargs: object) -> object:
            counter[0] += 1
            if counter[0] == kill_at:
                if name == "pwrite":
                    original(args[0], args[1][: len(args[1]) // 2], args[2])  # type: ignore[index, arg-type]
                os.kill(os.getpid(), signal.SIGKILL)
            if kill_at == -1:
                Path(sys.argv[2], "count").write_text(str(counter[0]))
            if name == "fsync":
                return None  # slow, and no matter here: what a killed process wrote stays written
            return original(*args, **kwargs)

        setattr(owner, name, operation)

    for name in ("pwrite", "fsync", "replace", "unlink", "truncate", "open", "rename"):
        wrap(os, name)


def digest(out: Path) -> dict[str, str]:
    """Every file and its content."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(out.iterdir())}


def main() -> None:
    """See the module."""
    torch.set_num_threads(1)
    source, work, layout, stride = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    out, state = work / "out", work / "state.json"

    def attempt() -> None:
        job(source, out, state, layout)

    def fresh() -> None:
        shutil.rmtree(out, ignore_errors=True)
        state.unlink(missing_ok=True)

    began = time.monotonic()
    run(attempt, kill_at=-1)
    seconds = time.monotonic() - began
    reference, points = digest(out), int((work / "count").read_text())
    different, kills = [], 0
    for point in range(1, points + 1, stride):
        fresh()
        assert not run(attempt, kill_at=point)
        kills += 1
        if point % 4 == 0:  # and again, while it recovers
            kills += not run(attempt, kill_at=1 + point % 23)
        run(attempt)
        if point % 5 == 0:  # the state of an unfinished job over a finished folder
            run(attempt)
        if digest(out) != reference:
            different.append(point)
    chance = random.Random(0)
    for trial in range(TRIALS):
        fresh()
        while not run(attempt, kill_after=chance.uniform(0, 1.3 * seconds)):
            kills += 1
        if digest(out) != reference:
            different.append(-trial)
    print(json.dumps({"points": points, "kills": kills, "different": different, "files": list(reference)}))


if __name__ == "__main__":
    main()
