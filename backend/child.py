"""The frame of every program that a runner starts for a stage.

The program's standard output is the job's event file: one JSON object per line. Whatever libraries print
goes to standard error, which is the job's log.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from backend.disk import NEARLY_FULL, NO_SPACE_EXIT, free_bytes, is_disk_full, unwritten_path
from backend.errors import ConfigError, QuantdeckError
from backend.event_stream import EventWriter, Progress
from backend.files import read_request, write_json
from backend.process import die_with_starter

INTERRUPTED_EXIT = 128 + signal.SIGINT

Program = Callable[[dict[str, Any], EventWriter], dict[str, Any]]
"""Takes the request and the event writer, returns the result."""


def run_child(program: Program) -> None:
    """Run a stage program: `python -m <module> REQUEST.json RESULT.json`.

    The result is written atomically, and only when all went well. An error becomes an `error` event and exit
    code 1, 2 for a wrong request, or `NO_SPACE_EXIT` for a full disk, where the event itself may be lost.
    """
    parser = argparse.ArgumentParser(description="A stage of a Quantdeck job.")
    parser.add_argument("request", type=Path, help="JSON file that says what to do")
    parser.add_argument("result", type=Path, help="JSON file to write")
    options = parser.parse_args()
    die_with_starter()
    # A shell that starts a dashboard in the background has SIGINT ignored in everything below it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    events = EventWriter.claim_stdout()
    try:
        write_json(options.result, program(read_request(options.request), events))
    except KeyboardInterrupt:  # the runner asks to stop: what is finished is on the disk already
        sys.exit(INTERRUPTED_EXIT)
    except Exception as error:  # the frame of the program: everything ends as an event, with its trace in the log
        sys.exit(_tell(error, events, options.result.parent))


def progress_of(request: Mapping[str, Any], stage: str, events: EventWriter) -> Progress:
    """A function that sends progress events of a stage, with the request's `configuration` if it names one."""
    about = {"configuration": request["configuration"]} if request.get("configuration") else {}

    def progress(step: int, total: int, message: str) -> None:
        events.note(stage=stage, step=step, total=total, message=message, **about)

    return progress


def _tell(error: Exception, events: EventWriter, folder: Path) -> int:
    """Report an error as far as the disk allows; returns the exit code."""
    full = is_disk_full(error) or free_bytes(folder) < NEARLY_FULL
    if full:
        message = unwritten_path(error)  # the runner says the rest
    else:
        message = error.message if isinstance(error, QuantdeckError) else str(error) or type(error).__name__
    with contextlib.suppress(OSError):
        events.error(error, message)
    if full or not isinstance(error, QuantdeckError):
        with contextlib.suppress(OSError):
            traceback.print_exc()
    if full:
        return NO_SPACE_EXIT
    return 2 if isinstance(error, ConfigError) else 1
