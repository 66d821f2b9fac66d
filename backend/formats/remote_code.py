"""Code that comes with a model ("remote code"): never run, unless the job asks for it and the operator allows it.

The runner tells a job's programs by one variable of their environment, and gives them a place of their own for the
modules that transformers copies out of a model's folder. All other processes, above all the dashboard and the runner
itself, are without it: there a model that brings code is refused before any loader sees it.

Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from backend.errors import ModelError

VARIABLE = "QUANTDECK_REMOTE_CODE"
MODULES_VARIABLE = "HF_MODULES_CACHE"
KEY = "auto_map"
"""The one key that the permission is about: classes for transformers' Auto classes, as `module.Class`."""
OWN_CLASS = re.compile(r"[A-Za-z_]\w*\.[A-Za-z_]\w*")
SETTING = "[models] allow_remote_code = true in quantdeck.toml"


def remote_code_allowed() -> bool:
    """Whether this process may run the code of the model that it works on."""
    return os.environ.get(VARIABLE) == "1"


def environment(base: Mapping[str, str], modules: Path | None) -> dict[str, str]:
    """The environment of a program, with the permission given or taken away, whatever `base` says.

    Args:
        base: What it sees otherwise.
        modules: Where copies of a model's modules are kept if their code may be run; None: it may not.
    """
    plain = {key: value for key, value in base.items() if key not in (VARIABLE, MODULES_VARIABLE)}
    return plain if modules is None else {**plain, VARIABLE: "1", MODULES_VARIABLE: str(modules)}


def own_modules() -> Path | None:
    """Where this process keeps copies of a model's modules; None if it may not run their code."""
    return Path(os.environ[MODULES_VARIABLE]) if remote_code_allowed() else None


def check_own_code(path: Path, value: Any) -> None:
    """Refuse an `auto_map` that names code of another place than the model's own folder.

    Args:
        path: The JSON file that has it.
        value: What it says.

    Raises:
        ModelError: If a class is of another repository, or its module is no file beside `path`.
    """
    for name in _names(value):
        module = path.parent / f"{name.partition('.')[0]}.py"
        if not OWN_CLASS.fullmatch(name):
            raise ModelError(
                f"{path} sets {KEY}: {name[:80]!r}; even with TRUST_REMOTE_CODE only classes of files beside it are "
                "taken, as 'module.Class', and none of another repository. Download that code into the model's folder."
            )
        if not module.is_file():
            raise ModelError(f"{path} sets {KEY}: {name[:80]!r}, but there is no {module}; get the model again.")


def _names(value: Any) -> Iterator[str]:
    """The classes of an `auto_map`; tokenizers have pairs, slow and fast, either of which may be missing."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _names(item)
    elif isinstance(value, list):
        for item in value:
            yield from _names(item)
    elif value is not None:
        yield str(value)
