"""The frame of every program that a runner starts for a stage.

The program's standard output is the job's event file: one JSON object per line. Whatever libraries print
goes to standard error, which is the job's log.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs.process import die_with_parent

PARENT_VARIABLE = "QUANTDECK_PARENT_PID"

Emit = Callable[..., None]


def run_child(main: Callable[[dict[str, Any], Emit], dict[str, Any]]) -> None:
    """Run a stage program: `python -m <module> REQUEST.json RESULT.json`.

    Args:
        main: Takes the request and `emit(stage=..., step=..., total=..., ...)`, returns the result.
            The result is written atomically. A `QuantdeckError` becomes an `error` event, exit code 1.
    """
    if parent := os.environ.get(PARENT_VARIABLE):
        die_with_parent(int(parent))
    events = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # from here on, print() and C libraries write to the log

    def emit(**event: Any) -> None:
        events.write(json.dumps({"t": round(time.time(), 3), **event}) + "\n")

    request_file, result_file = (Path(a) for a in sys.argv[1:3])
    try:
        result = main(json.loads(request_file.read_text()), emit)
    except QuantdeckError as error:
        emit(stage="error", kind=type(error).__name__, message=error.message)
        sys.exit(1)
    except MemoryError:
        emit(stage="error", kind="MemoryError", message="out of memory")
        sys.exit(1)
    except Exception as error:  # the frame of the program: everything ends as an event with its trace in the log
        traceback.print_exc()
        emit(stage="error", kind=type(error).__name__, message=str(error) or type(error).__name__)
        sys.exit(1)
    write_json(result_file, result)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
