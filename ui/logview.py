"""The log of a job on its page.

The browser asks for new lines by itself (`log.js`), with a cursor that it gets back from each answer: the server
keeps nothing per page, a page that was closed or reloaded loses nothing, and no line is sent twice. What the
browser keeps is bounded; the whole log is a download.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from threading import BoundedSemaphore
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs import control
from backend.jobs.logs import search
from backend.jobs.logs.tail import tail
from backend.jobs.store import JobStore
from backend.paths import Home
from ui.layout import esc, plain
from ui.reading import briefly, whole

MAX_ANSWER = 200_000  # characters of one answer, which is also what a fresh page begins with
MAX_LINE = 4_000  # characters of one line that are shown
MAX_CURSOR = 2_000
MAX_TEXT = 200
MAX_FOUND = 500
NOT_UNDERSTOOD = "this page asked for a log in a way that is not understood; reload it"
LOG_JS = (Path(__file__).parent / "log.js").read_text(encoding="utf-8")

Answer = dict[str, Any]

_searches = BoundedSemaphore(2)  # each reads a whole log, which may be hundreds of MB


def frame_html() -> str:
    """The box that `log.js` fills: follow or pause, search, download, lines."""
    return (
        '<div class="qd-log-tools"><button type="button" class="qd-button qd-secondary" data-follow '
        'aria-pressed="true">Pause</button>'
        '<input type="search" data-find placeholder="Search; Enter for the whole log" aria-label="Search in the log" '
        'maxlength="200"><span class="qd-muted qd-small" data-told role="status"></span>'
        '<a class="qd-button qd-secondary" data-whole hidden download title="All of it, from its beginning">'
        "Download</a></div>"
        '<pre class="qd-log" data-lines tabindex="0" aria-label="Log of the job"></pre>'
    )


def log_address(uid: str) -> str:
    """Where the whole log is downloaded."""
    return f"/download/{esc(uid)}.log"


def functions(home: Home) -> list[Callable[[Any], Answer]]:
    """What the browser calls: for new lines, and for lines of the whole log."""

    def read_log(asked: Any) -> Answer:
        return log_after(home, asked)

    def find_in_log(asked: Any) -> Answer:
        return found_in(home, asked)

    return [read_log, find_in_log]


def log_after(home: Home, asked: Any) -> Answer:
    """What is new in a job's log.

    Args:
        home: The home.
        asked: What came from the browser: `uid`, and `cursor` of the last answer (none on a fresh page).

    Returns:
        `lines`, `cursor` for the next call, `active` (whether more can come), `cut` (lines that were left out because
        too many came at once); or `error`, after which the browser asks again later.
    """
    uid, cursor = _texts(asked, "uid", "cursor")
    if uid is None or cursor is None:
        return {"error": NOT_UNDERSTOOD}
    try:
        with briefly():
            job = JobStore(home).get(uid)
            path = _log_path(home, job.uid)
        lines, after = tail(path, cursor or None)
    except QuantdeckError as error:
        return {"error": plain(error.message)}
    except OSError as error:
        return {"error": f"the log cannot be read: {error.strerror}"}
    kept, cut = bounded(lines)
    return {
        "lines": [_shown(line) for line in kept],
        "cursor": after,
        "active": job.is_active,
        "cut": cut,
        "address": log_address(job.uid),
    }


def found_in(home: Home, asked: Any) -> Answer:
    """The lines of the whole log, its older files included, that contain a text.

    Args:
        home: The home.
        asked: What came from the browser: `uid` and `text`.

    Returns:
        `lines` (the first `MAX_FOUND` of them) and `more` (whether there may be more); or `error`.
    """
    uid, text = _texts(asked, "uid", "text")
    if uid is None or text is None:
        return {"error": NOT_UNDERSTOOD}
    try:
        with briefly():
            path = _log_path(home, JobStore(home).get(uid).uid)
        if not _searches.acquire(blocking=False):
            return {"error": "other searches are running; try again in a moment"}
        try:
            found = search.find(path, text.strip()[:MAX_TEXT], limit=MAX_FOUND)
        finally:
            _searches.release()
    except QuantdeckError as error:
        return {"error": plain(error.message)}
    except OSError as error:
        return {"error": f"the log cannot be read: {error.strerror}"}
    return {"lines": [_shown(match.text) for match in found], "more": len(found) == MAX_FOUND}


def _texts(asked: Any, *names: str) -> list[str | None]:
    """Values of a request that came from a browser, empty where it has none; None for what cannot be one."""
    if not isinstance(asked, Mapping):
        return [None for _ in names]
    values = [asked.get(name) or "" for name in names]
    return [whole(value) if isinstance(value, str) and len(value) <= MAX_CURSOR else None for value in values]


def _shown(line: str) -> str:
    return plain(line if len(line) <= MAX_LINE else f"{line[:MAX_LINE]} ...")


@lru_cache(maxsize=256)
def _log_path(home: Home, uid: str) -> Path:
    """The job's log; its file says where, and that never changes."""
    return control.log_path(home, uid)


def bounded(lines: list[str]) -> tuple[list[str], int]:
    """The last lines that fit into one answer, and how many were left out."""
    room, first = MAX_ANSWER, len(lines)
    while first > 0 and (room := room - min(len(lines[first - 1]), MAX_LINE) - 1) >= 0:
        first -= 1
    return lines[first:], first
