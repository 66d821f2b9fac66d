"""The frame of every program that a runner starts for a stage.

The program's standard output is the job's event file: one JSON object per line. Whatever libraries print
goes to standard error, which is the job's log.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.errors import QuantdeckError
from backend.event_stream import EventWriter
from backend.files import read_request, write_json
from backend.process import die_with_starter

Emit = Callable[..., None]


def run_child(main: Callable[[dict[str, Any], Emit], dict[str, Any]]) -> None:
    """Run a stage program: `python -m <module> REQUEST.json RESULT.json`.

    Args:
        main: Takes the request and `emit(stage=..., step=..., total=..., ...)`, returns the result.
            The result is written atomically. An error becomes an `error` event and exit code 1.
    """
    die_with_starter()
    events = EventWriter.claim_stdout()

    def emit(**event: Any) -> None:
        events.send({"t": round(time.time(), 3), **event})

    request_file, result_file = (Path(a) for a in sys.argv[1:3])
    try:
        write_json(result_file, main(read_request(request_file), emit))
    except QuantdeckError as error:
        events.error(error, error.message)
        sys.exit(1)
    except Exception as error:  # the frame of the program: everything ends as an event, with its trace in the log
        traceback.print_exc()
        events.error(error, str(error) or type(error).__name__)
        sys.exit(1)
