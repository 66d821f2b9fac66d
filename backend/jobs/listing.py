"""Which jobs a list shows and in which order, as conditions and orders of SQL.

A search is words as they are, looked for in names, models, algorithms, ids, tags and notes; `tag:sweep` in it asks for
jobs with exactly that tag. What can be sorted by is named here, so nothing of a request becomes a part of a query.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from backend.jobs.states import State

_TAG_WORD = re.compile(r"(?:^|(?<=\s))tag:(\S*)", re.IGNORECASE)
_SEARCHED = "(job_id || ' ' || model || ' ' || algorithm || ' ' || uid || ' ' || tags || ' ' || note)"
_BY_STATE: tuple[State, ...] = (
    "running", "starting", "cancelling", "queued", "lost", "succeeded", "failed", "cancelled",
)  # fmt: skip
_RUN_TIME = "julianday(coalesce(finished_at, strftime('%Y-%m-%dT%H:%M:%f', 'now'))) - julianday(started_at)"

SORTS: dict[str, str] = {
    "name": "job_id COLLATE NOCASE",
    "state": "CASE state " + " ".join(f"WHEN '{state}' THEN {i}" for i, state in enumerate(_BY_STATE)) + " END",
    "algorithm": "algorithm",
    "started": "coalesce(started_at, created_at)",
    "time": _RUN_TIME,
}
"""What a list can be sorted by; `-name` is the same downwards. Empty: newest first. Jobs that are alike in it: newest
first; jobs that have no such value (one that has not run has no run time): last."""


def is_sort(sort: str) -> bool:
    """Whether `sort` names an order."""
    return sort == "" or sort.removeprefix("-") in SORTS


def order(sort: str) -> str:
    """The `ORDER BY` of a sort.

    Raises:
        ValueError: If there is no such sort.
    """
    if not is_sort(sort):
        raise ValueError(f"a list is sorted by one of {', '.join(SORTS)}, with or without '-' before it, not {sort!r}")
    if not sort:
        return "ORDER BY uid DESC"
    value = SORTS[sort.removeprefix("-")]
    return f"ORDER BY ({value}) IS NULL, {value} {'DESC' if sort.startswith('-') else 'ASC'}, uid DESC"


def split_search(search: str) -> tuple[str, list[str]]:
    """A search's words without its tags, and its tags."""
    tags = [tag.lower() for tag in _TAG_WORD.findall(search) if tag]
    return " ".join(_TAG_WORD.sub("", search).split()) if _TAG_WORD.search(search) else search.strip(), tags


def condition(states: Sequence[State] = (), search: str = "", *, deleted: bool = False) -> tuple[str, list[Any]]:
    """The `WHERE` of a list, and its values.

    Args:
        states: Only jobs in one of these; all if empty.
        search: As a person types it.
        deleted: The deleted jobs instead of the others; never those that were deleted for good.
    """
    parts = ["deleted_at IS NOT NULL AND erased IS NOT 'done'" if deleted else "deleted_at IS NULL"]
    values: list[Any] = []
    if states:
        parts.append(f"state IN ({', '.join('?' * len(states))})")
        values += list(states)
    words, tags = split_search(search)
    if words:
        parts.append(f"{_SEARCHED} LIKE ? ESCAPE '\\'")
        escaped = words.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        values.append(f"%{escaped}%")
    for tag in tags:
        parts.append("instr(' ' || tags || ' ', ?) > 0")
        values.append(f" {tag} ")
    return f"WHERE {' AND '.join(parts)}", values
