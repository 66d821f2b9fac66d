"""The frame of every program that a runner starts for a stage.

The program's standard output is the job's event file: one JSON object per line. Whatever libraries print
goes to standard error, which is the job's log.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from backend.errors import ConfigError, QuantdeckError
from backend.event_stream import EventWriter
from backend.files import read_request, write_json
from backend.process import die_with_starter

Program = Callable[[dict[str, Any], EventWriter], dict[str, Any]]
"""Takes the request and the event writer, returns the result."""


def run_child(program: Program) -> None:
    """Run a stage program: `python -m <module> REQUEST.json RESULT.json`.

    The result is written atomically, and only when all went well. An error becomes an `error` event and exit
    code 1, or 2 for a wrong request.
    """
    parser = argparse.ArgumentParser(description="A stage of a Quantdeck job.")
    parser.add_argument("request", type=Path, help="JSON file that says what to do")
    parser.add_argument("result", type=Path, help="JSON file to write")
    options = parser.parse_args()
    die_with_starter()
    events = EventWriter.claim_stdout()
    try:
        write_json(options.result, program(read_request(options.request), events))
    except QuantdeckError as error:
        events.error(error, error.message)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except Exception as error:  # the frame of the program: everything ends as an event, with its trace in the log
        traceback.print_exc()
        events.error(error, str(error) or type(error).__name__)
        sys.exit(1)
