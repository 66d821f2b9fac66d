"""A process that dies by its own hand in an operation on files, for tests of what a kill leaves behind."""

from __future__ import annotations

import os
import signal
from typing import Any

OPERATIONS = ("pwrite", "fsync", "replace", "unlink", "truncate", "open")


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
