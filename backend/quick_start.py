"""Importing PyTorch, transformers and the like in half the time.

A job is several programs, and each of them begins with these imports: of 5.0 s of a program that did nothing but
import the loader of models, 1.1 s were garbage collections while modules were made, 1.3 s the one at its end, and
1.0 s scikit-learn, which transformers loads, with pandas and scipy, for a kind of text generation that nothing here
uses. Without them it is 2.3 s (2026-11-28, 2 cores of an AMD EPYC).

A program that imports them at its top is started through this one: `python -m backend.quick_start MODULE ARGUMENT...`
imports the module and calls its `main`.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

UNUSED = ("sklearn",)


def quick_import(*names: str) -> None:
    """Import modules, and all that they import, without what makes it slow.

    What the imports leave is frozen: no later garbage collection looks through it, the one at the end included.
    Nothing happens if all of them are imported already.

    Args:
        names: Full names of the modules.
    """
    if all(name in sys.modules for name in names):
        return
    collects = gc.isenabled()
    gc.disable()
    try:
        with _hidden(*UNUSED):
            for name in names:
                importlib.import_module(name)
        gc.freeze()
    finally:
        if collects:
            gc.enable()


@contextmanager
def _hidden(*names: str) -> Iterator[None]:
    """Packages that are not there for imports meanwhile, unless somebody has imported them before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def main() -> None:
    """Run the program that the first argument names; it finds its own arguments in `sys.argv`."""
    name = sys.argv.pop(1)
    quick_import(name)
    sys.modules[name].main()


if __name__ == "__main__":
    main()
