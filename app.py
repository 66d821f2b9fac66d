"""Starts the Quantdeck dashboard: `python app.py [--host 127.0.0.1] [--port 7860] [--home DIR]`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

# Read once, when gradio is imported: no telemetry, no version check.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

from backend.errors import QuantdeckError
from backend.paths import Home
from backend.quick_start import quick_import


def main() -> int:
    """Parse the arguments and serve; returns the exit code."""
    parser = argparse.ArgumentParser(prog="app.py", description="Start the Quantdeck dashboard.")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; other than loopback ones need accounts (default: 127.0.0.1)",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    parser.add_argument("--home", type=Path, help="folder of jobs.db and user_data (default: QUANTDECK_HOME or here)")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("quantdeck").setLevel(logging.INFO)
    quick_import("ui.server")
    from ui.server import serve

    try:
        serve(Home.at(arguments.home) if arguments.home else Home.default(), arguments.host, arguments.port)
    except QuantdeckError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
