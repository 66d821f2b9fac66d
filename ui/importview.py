"""What was found in a job file that was opened: understood, wrong, unknown, kept for other programs; with lines."""

from __future__ import annotations

from collections.abc import Sequence

from backend.errors import QuantdeckError
from backend.schema import Document
from backend.schema.errors import UnreadableFile
from backend.schema.report import Remark, report
from ui.differences import differences
from ui.layout import card, esc, notice

MOST_SHOWN = 30  # remarks of one kind
MOST_NAMED = 12  # settings that differ


def import_html(document: Document, name: str, *, was_json: bool = False) -> str:
    """The report of a file that is in the form now.

    Args:
        document: The file.
        name: What it is called.
        was_json: Whether it was read as JSON.
    """
    found = report(document)
    total = sum(found.understood.values())
    parts = ", ".join(f"{section} {count}" for section, count in found.understood.items())
    lead = f"{_many(total, 'setting')} understood" + (f": {parts}." if parts else ".")
    if was_json:
        lead += " It was JSON; from here on it is YAML."
    body = f'<p class="qd-small">{esc(lead)}</p>' + _differing(document)
    if found.wrong:
        heading = f"{_many(len(found.wrong), 'setting')} wrong: the message stands at each control"
        body += _box("error", heading, _items(found.wrong))
    if found.unknown:
        heading = f"{_many(len(found.unknown), 'key')} not known here: kept in the file, without effect"
        body += _box("warn", heading, _items(found.unknown))
    if found.unread:
        heading = f"{_many(len(found.unread), 'line')} kept for other programs, and not read"
        body += f'<details class="qd-import-more"><summary>{esc(heading)}</summary>{_items(found.unread)}</details>'
    kind = "error" if found.wrong else "warn" if found.unknown else "good"
    shown = card(f'<div class="qd-stack">{body}</div>', f"{name} is in the form", classes=f"qd-import qd-import-{kind}")
    return f'<div role="status">{shown}</div>'


def unreadable_html(error: QuantdeckError, what: str) -> str:
    """Why a file was not opened, with the line at which reading it ended."""
    heading = f"{what} was not opened"
    if not isinstance(error, UnreadableFile) or not error.shown:
        return notice("error", heading, error.message)
    where = f"Line {error.line}, column {error.column}: {error.problem}."
    pointer = " " * (error.caret - 1) + "^"
    return (
        f'<div class="qd-notice qd-error" role="alert"><strong>{esc(heading)}</strong><p>{esc(where)}</p>'
        f'<pre class="qd-log" tabindex="0">{esc(error.shown)}\n{pointer}</pre>'
        "<p>The form is as it was before.</p></div>"
    )


def _differing(document: Document) -> str:
    found = differences(document.dump())
    if not found:
        return '<p class="qd-muted qd-small">Nothing differs from the defaults.</p>'
    rows = "".join(
        f"<li>{_place(one.line + 1, one.key)} (default: {esc(one.default)})</li>" for one in found[:MOST_NAMED]
    )
    more = f"<li>and {len(found) - MOST_NAMED} more</li>" if len(found) > MOST_NAMED else ""
    heading = f"{_many(len(found), 'setting')} other than the default"
    return f'<details class="qd-import-more"><summary>{esc(heading)}</summary><ul>{rows}{more}</ul></details>'


def _items(remarks: Sequence[Remark]) -> str:
    rows = [
        f"<li>{_place(one.line, one.key)}{': ' if one.text else ''}{esc(one.text)}</li>" for one in remarks[:MOST_SHOWN]
    ]
    if len(remarks) > MOST_SHOWN:
        rows.append(f"<li>and {len(remarks) - MOST_SHOWN} more</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _place(line: int, key: str) -> str:
    """A key of the file and the line it stands in; one that it does not have is told as such."""
    where = f'<span class="qd-line">line {line}</span> ' if line else '<span class="qd-line">not in the file</span> '
    return f"{where}<code>{esc(key or 'the file')}</code>"


def _box(kind: str, heading: str, body: str) -> str:
    role = "alert" if kind == "error" else "status"
    return f'<div class="qd-notice qd-{kind}" role="{role}"><strong>{esc(heading)}</strong>{body}</div>'


def _many(count: int, what: str) -> str:
    return f"1 {what} is" if count == 1 else f"{count} {what}s are"
