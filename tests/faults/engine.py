"""The programs of `tests.jobs.fake` as the engine of real runners, with a note of every start.

Each start of the quantize program adds a line to HOME/starts.txt: uid, attempt, pid, and `overlap` if another engine
of the same job was still alive. While HOME/hold exists, the program waits after its first layer.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
import time
from pathlib import Path

from backend.paths import PROJECT

MODULE = "tests.faults.engine"
STEP_S, LONG_STEP_S = 0.15, 2.0


def install() -> None:
    """Replace, in a runner that is about to start, the engine and the configurations."""
    from backend.engines import configurations as module
    from backend.engines.configurations import Configuration
    from backend.engines.registry import Engine

    request = {"name": "w4", "label": "W4"}
    module.configurations = lambda config, device="cpu": [Configuration("w4", "W4", "fake", request)]
    from backend.jobs import measure, one_program, stages

    engine = Engine(name="fake", algorithms=(), module=MODULE, requires=(), environment=None, about="")
    stages.PREPARE = measure.WORKER = measure.SPEED = MODULE
    one_program.engine_for = lambda config: engine


def prepare_home(root: Path, settings: str = "") -> None:
    """What the fake programs need to find in a home."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "fake.json").write_text(json.dumps({"configurations": [{"name": "w4"}]}))
    if settings:
        (root / "quantdeck.toml").write_text(settings)


def environment() -> dict[str, str]:
    """The variables under which everything that is started uses this engine."""
    return {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent / "site"), str(PROJECT)])}


def starts(root: Path) -> list[tuple[str, int, int, bool]]:
    """Every start of the quantize program: uid, attempt, pid, whether another one of the job was alive."""
    path = root / "starts.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(uid, int(n), int(pid), overlap == "overlap") for uid, n, pid, overlap in (x.split() for x in lines)]


class _Slow:
    """The event writer, with time between the steps so that a kill can hit every one of them.

    Every third job takes long: its engine, should it survive its runner, meets the one of the next attempt.
    """

    def __init__(self, events, hold: Path, uid: str) -> None:
        self._events, self._hold = events, hold
        self._step_s = LONG_STEP_S if int(uid, 16) % 3 == 0 else STEP_S

    def note(self, **facts) -> None:
        self._events.note(**facts)
        time.sleep(self._step_s)
        while self._hold.exists():
            time.sleep(STEP_S)


def program(request, events):
    from tests.jobs import fake

    if "configurations" not in request:
        return fake.program(request, events)
    run_dir = Path(request["out_dir"]).parent
    home = run_dir.parents[3]
    uid, _, attempt = os.environ["QUANTDECK_JOB"].partition(":")
    with open(run_dir / "engine.lock", "a") as lock:
        alone = "alone"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            alone = "overlap"
        line = f"{uid} {attempt} {os.getpid()} {alone}\n"
        handle = os.open(home / "starts.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.write(handle, line.encode())
        os.close(handle)
        return fake.program(request, _Slow(events, home / "hold", uid))


if __name__ == "__main__":
    from backend.child import run_child

    sys.exit(run_child(program))
