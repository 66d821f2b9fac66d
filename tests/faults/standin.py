"""A runner that does no work, and a scheduler that starts it: for tests of what happens around a runner.

`python -m tests.faults.standin HOME UID ATTEMPT` plays a runner as HOME/standin.json says: `seconds` it runs for,
`die` (kill itself then). `python -m tests.faults.standin HOME` is the real scheduler with such runners; `idle_s` is
how long it stays without jobs. Every start of a runner is a line in HOME/starts.txt, every end one in HOME/ends.txt.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from backend.jobs.store import JobStore
from backend.paths import Home
from backend.process import hold_lock, process_facts

MODULE = "tests.faults.standin"


def note(path: Path, *words: object) -> None:
    """Add a line to a file that several processes write."""
    with open(path, "ab", buffering=0) as file:
        file.write((" ".join(map(str, words)) + "\n").encode())


def lines(path: Path) -> list[list[str]]:
    """The words of each line of `note`."""
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def run(home: Home, uid: str, attempt: int) -> None:
    """One attempt, from `starting` to `succeeded`."""
    play = json.loads((home.root / "standin.json").read_text())
    store = JobStore(home)
    with hold_lock(home.run_dir(uid) / "runner.lock") as lock:
        if lock is None or not store.move(uid, "running", actor="runner", attempt=attempt):
            return
        note(home.root / "starts.txt", uid, attempt, os.getpid())
        facts = {**process_facts(), "attempt": attempt}
        (home.run_dir(uid) / "runner.json").write_text(json.dumps(facts))
        until = time.monotonic() + play["seconds"]
        while time.monotonic() < until and store.beat(uid, attempt):
            time.sleep(min(0.1, play["seconds"]))
        if play.get("die"):
            os.kill(os.getpid(), signal.SIGKILL)
        wrote = store.update(uid, attempt, result={"attempt": attempt})
        moved = store.move(uid, "succeeded", actor="runner", attempt=attempt)
        note(home.root / "ends.txt", uid, attempt, wrote, moved)


def serve(home: Home) -> None:
    """The scheduler, with runners of this module."""
    from backend.jobs import launch, scheduler

    launch.RUNNER = MODULE
    scheduler.TICK_S = 0.1
    scheduler.IDLE_S = json.loads((home.root / "standin.json").read_text()).get("idle_s", scheduler.IDLE_S)
    scheduler.main()


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run(Home.at(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    else:
        serve(Home.at(sys.argv[1]))
