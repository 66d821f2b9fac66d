"""Loaded by every Python that has this folder in PYTHONPATH: runners get the engine of `tests.faults.engine`.

So the real store, scheduler and runner can be tested with their real commands, and only the work itself is replaced.
"""

import sys

if "backend.jobs.runner" in sys.orig_argv:
    from tests.faults import engine

    engine.install()
