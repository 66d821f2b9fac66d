"""Which accuracy tasks exist: the demo's own, and those installed with lm_eval.

Only names are accepted, never paths: a task file may name Python functions, so whoever chooses the file
chooses code. lm_eval itself falls back from an unknown name to a file of that name in the working
directory, which is why every name is checked here first. Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from backend.demo import TASK_NAME
from backend.errors import ConfigError, EngineError

NAME = re.compile(r"[A-Za-z0-9_\-]+")
_DECLARED = re.compile(rb"""^["']?(?:task|group|tag)["']?:[ \t]*((?:\n[ \t]*-[ \t]+[^\n]*)+|[^\n]*)""", re.MULTILINE)


def task_exists(name: str) -> bool:
    """Whether a task, group or tag of this name can be run.

    The demo's task costs nothing; a name that an lm_eval file spells out costs one read of its task files
    (0.5 s when they are in the page cache, kept for the process); only an unknown name costs the parse of
    all of them (about 10 s).
    """
    if not NAME.fullmatch(name):
        return False
    return name == TASK_NAME or name in _declared() or name in _all_names()


def check_tasks(names: Iterable[str]) -> None:
    """Check task names before a job starts.

    Raises:
        ConfigError: If a name is unknown or not a plain name; with the nearest names that exist.
    """
    for name in names:
        if not NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} is not a task name: only letters, digits, '_' and '-' are allowed, and no paths.",
                key="EVALUATION.TASKS",
                value=name,
            )
        if not task_exists(name):
            near = difflib.get_close_matches(name, [TASK_NAME, *_all_names()], n=4, cutoff=0.6)
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise ConfigError(
                f"{name!r} is not the demo task and not among lm_eval's installed tasks.{hint}",
                key="EVALUATION.TASKS",
                value=name,
            )


def declaring_folders(name: str) -> frozenset[Path]:
    """Folders of lm_eval's task files that spell out this name; empty for inherited and unknown names."""
    return frozenset(_declared().get(name, ()))


@cache
def _declared() -> dict[str, set[Path]]:
    """Names written as `task:`, `group:` or `tag:` in lm_eval's task files, found without parsing YAML."""
    found: dict[str, set[Path]] = {}
    for path in _builtin_folder().rglob("*yaml"):  # templates that others include end in `_yaml`
        for value in _DECLARED.findall(path.read_bytes()):
            for part in re.split(r"[\n,]", value.decode("utf-8", "replace")):
                name = part.strip().removeprefix("-").split(" #")[0].strip().strip("\"'[] ")
                if NAME.fullmatch(name):
                    found.setdefault(name, set()).add(path.parent)
    return found


@cache
def _all_names() -> frozenset[str]:
    """Names that lm_eval's own index knows, inherited ones included."""
    from lm_eval.tasks import TaskManager

    return frozenset(name for name in TaskManager().all_tasks if NAME.fullmatch(name))


def _builtin_folder() -> Path:
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("lm_eval is not installed, so accuracy tasks cannot run. Install requirements.txt.")
    return Path(spec.submodule_search_locations[0]) / "tasks"
