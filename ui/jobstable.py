"""The list of jobs as HTML: heading, states to choose from, the table with its boxes to select, and what can be done.

What is selected is known to the browser alone (`jobs.js`); the server gets ids with a click, and checks each.
"""

from __future__ import annotations

from pathlib import Path

from backend.jobs.states import FINAL
from backend.jobs.store import Job
from ui.format import ago
from ui.jobslist import DELETED, GROUPS, PER_PAGE, Listing
from ui.jobview import CANCELLABLE, actions, badges, headline, progress_cell, run_time
from ui.layout import action, empty, esc, link, notice, title
from ui.reading import Told

MAX_COMPARED = 6  # by the button on top, which chooses by itself
MAX_NOTE = 90  # characters of a note in the list; all of it is on the job's page
COLUMNS = (
    ("Job", "name"), ("State", "state"), ("Algorithm", "algorithm"), ("Progress", ""), ("Started", "started"),
    ("Run time", "time"), ("Result", ""), ("", ""),
)  # fmt: skip
"""Each column's head, and what it sorts by."""
DIRECTIONS = {"": "none", "-": "descending", "+": "ascending"}
# An answer is brought into view, since the list below it may be scrolled, and its last button gets the focus: the way
# back, not the way that has none.
SAID_JS = """
const tell = () => {
  const said = element.querySelector('.qd-notice');
  if (!said) return;
  const { top, bottom } = said.getBoundingClientRect();
  if (top < 0 || bottom > innerHeight) said.scrollIntoView({ block: 'center' });
  [...said.querySelectorAll('button')].pop()?.focus({ preventScroll: true });
};
watch('value', tell);
tell();  // the first answer is there before this runs
"""
SELECT_JS = (Path(__file__).parent / "jobs.js").read_text(encoding="utf-8")


def title_html(listing: Listing) -> str:
    """The heading with what is going on, and the ways to start and to compare."""
    counts = listing.counts
    if listing.is_new:
        return title("Jobs")
    words = ((key, GROUPS[key][0].lower()) for key in ("running", "waiting"))
    numbers = ((sum(counts.get(state, 0) for state in GROUPS[key][1]), word) for key, word in words)
    lead = ", ".join(f"{n:,} {word}" for n, word in numbers if n)
    uids = [job.uid for job in listing.jobs if job.uid in listing.told and listing.told[job.uid].measured]
    buttons = link("Compare results", f"/compare?jobs={','.join(uids[:MAX_COMPARED])}") if uids else ""
    return title("Jobs", lead or "Nothing is running.", buttons + link("New job", "/new", "primary"))


def scheduler_html() -> str:
    """Said when jobs wait and nothing is there to start them."""
    return notice(
        "warn",
        "Jobs wait, and the scheduler is not running",
        "This dashboard starts it again every few seconds, and jobs that run already go on. If this message stays, "
        "`python -m backend doctor` tells what is wrong.",
    )


def filters_html(listing: Listing) -> str:
    """The states to choose from, each with its number of jobs; deleted ones only where there are some."""
    if listing.is_new:
        return ""
    shown = {key: name for key, (name, _) in GROUPS.items() if key != DELETED or listing.deleted}
    if listing.view.group == DELETED:
        shown[DELETED] = GROUPS[DELETED][0]
    chips = "".join(
        f'<button type="button" class="qd-chip" data-act="filter" data-uid="{key}" '
        f'aria-pressed="{"true" if key == listing.view.group else "false"}" data-turn="{listing.view.turn}">'
        f"{esc(name)} <b>{listing.groups.get(key, 0):,}</b></button>"
        for key, name in shown.items()
    )
    return f'<div class="qd-chips" role="group" aria-label="Jobs by state">{chips}</div>'


def table_html(listing: Listing) -> str:
    """The jobs as a table with the way to other pages; without any job, the way to the first one."""
    view = listing.view
    address = f' data-address="{esc(view.address)}" data-turn="{view.turn}"'
    if listing.is_new:
        first = empty(
            "No jobs yet",
            "A job takes a language model, makes it smaller, and measures what that cost: perplexity, accuracy, size "
            "and speed, before and after. The built-in demo model takes the whole path on this machine, without a "
            "download and without a GPU.",
            link("Start with the demo", "/new", "primary"),
        )
        return f"<div{address}>{first}</div>"
    if not listing.jobs:
        return f"<div{address}>{_nothing(listing)}</div>"
    body = "".join(_row(job, listing.told.get(job.uid)) for job in listing.jobs)
    every = '<th class="qd-pick"><input type="checkbox" data-all aria-label="Select all jobs shown"></th>'
    head = every + "".join(_head(word, column, view.sort) for word, column in COLUMNS)
    return (
        f'<div class="qd-card qd-flush"{address}>{_bulk(deleted=view.group == DELETED)}<div class="qd-scroll">'
        f'<table class="qd-table qd-jobs"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        f"{pager_html(listing)}</div>"
    )


def _nothing(listing: Listing) -> str:
    all_of_them = action("Show all", "clear", "")
    if listing.view.group == DELETED and not listing.view.search:
        text = "Jobs that you delete wait here, with all their files, until you restore them or delete them for good."
        return empty("Nothing is deleted", text, all_of_them)
    text = "No job has such a name, model, tag, note and state."
    return empty("No job matches", text, all_of_them)


def _head(word: str, column: str, sort: str) -> str:
    if not column:
        return f"<th>{word}</th>"
    way = "" if sort.removeprefix("-") != column else "-" if sort.startswith("-") else "+"
    return (
        f'<th aria-sort="{DIRECTIONS[way]}"><button type="button" class="qd-sort" data-act="sort" data-uid="{column}" '
        f'title="Sort by this column">{word}</button></th>'
    )


def _bulk(*, deleted: bool) -> str:
    """What can be done with the selected jobs; shown while there are some. The browser counts, and fills `{n}` in."""
    if deleted:
        buttons = _for_all("restore", "Restore {n}") + _for_all("ask-erase", "Delete {n} for good", kind="danger")
    else:
        ask = "Cancel the selected jobs that are not over ({n})? What they have finished is kept; they can be resumed."
        compare = (
            '<a class="qd-button qd-secondary" data-needs="compare" data-word="Compare {n}" '
            'data-to="/compare?jobs="></a>'
        )
        buttons = compare + _for_all("cancel", "Cancel {n}", ask=ask) + _for_all("delete", "Delete {n}", kind="danger")
    return (
        '<div class="qd-bulk" data-bulk hidden role="toolbar" aria-label="Selected jobs"><b data-count role="status">'
        f'</b><span class="qd-actions">{buttons}</span><button type="button" class="qd-icon" data-unselect '
        'title="Select none (Esc)" aria-label="Select none">✕</button></div>'
    )


def _for_all(act: str, word: str, *, kind: str = "secondary", ask: str = "") -> str:
    needs = "erase" if act == "ask-erase" else act
    extra = f' data-ask="{esc(ask)}"' if ask else ""
    return (
        f'<button type="button" class="qd-button qd-{kind}" data-act="{act}" data-needs="{needs}" '
        f'data-word="{word}"{extra}></button>'
    )


def pager_html(listing: Listing) -> str:
    """Which jobs are shown of how many, and the way to others; nothing if all are shown."""
    if listing.pages == 1:
        return ""
    number, last, sort = listing.view.page, listing.pages, listing.view.sort
    first = (number - 1) * PER_PAGE + 1
    back, on = ("Previous", "Next") if sort else ("Newer", "Older")
    ways = (("First", 1, number > 1), (back, number - 1, number > 1))
    ways += ((on, number + 1, number < last), ("Last", last, number < last))
    buttons = "".join(
        f'<button type="button" class="qd-button qd-secondary" data-act="page" data-uid="{to}"'
        f"{'' if there else ' disabled'}>{name}</button>"
        for name, to, there in ways
    )
    return (
        f'<div class="qd-pager"><span>{first:,} to {first + len(listing.jobs) - 1:,} of {listing.total:,} jobs, '
        f'page {number:,} of {last:,}</span><span class="qd-row-actions">{buttons}</span></div>'
    )


def tags_html(tags: tuple[str, ...]) -> str:
    """A job's tags; a click on one shows all jobs that have it."""
    return "".join(
        f'<button type="button" class="qd-tag" data-act="tag" data-uid="{esc(tag)}" title="Show all jobs with this '
        f'tag">{esc(tag)}</button>'
        for tag in tags
    )


def _labels(job: Job) -> str:
    tags = f'<span class="qd-tags">{tags_html(job.tags)}</span>' if job.tags else ""
    if not job.note:
        return tags
    line = " ".join(job.note.split())
    short = line if len(line) <= MAX_NOTE else f"{line[: MAX_NOTE - 3]}..."
    return f'{tags}<span class="qd-sub qd-note" title="{esc(job.note)}">{esc(short)}</span>'


def _can(job: Job, told: Told | None) -> str:
    """What a selection can do with the job, for the browser's counts."""
    if job.deleted_at:
        return "erase" if job.erased else "restore erase"
    words = ("cancel", job.state in CANCELLABLE), ("delete", job.state in FINAL), ("compare", told and told.measured)
    return " ".join(word for word, possible in words if possible)


def _row(job: Job, told: Told | None) -> str:
    priority = f'<span class="qd-sub">priority {job.priority}</span>' if job.priority else ""
    when = f'<span class="qd-sub">{esc(ago(job.deleted_at))}</span>' if job.deleted_at else ""
    return (
        f'<tr data-job="{esc(job.job_id)}"><td class="qd-pick"><input type="checkbox" data-pick '
        f'value="{esc(job.uid)}" data-can="{_can(job, told)}" aria-label="Select {esc(job.job_id)}"></td>'
        f'<td><a class="qd-name" href="/job?id={esc(job.uid)}">{esc(job.job_id)}</a>'
        f'<span class="qd-sub">{esc(job.model)}</span>{_labels(job)}</td><td>{badges(job)}{priority}{when}</td>'
        f"<td>{esc(job.algorithm)}</td><td>{progress_cell(job)}</td>"
        f'<td class="qd-nowrap">{esc(ago(job.started_at or job.created_at))}</td>'
        f'<td class="qd-nowrap">{esc(run_time(job))}</td><td>{told.headline if told else headline(job)}</td>'
        f'<td><div class="qd-row-actions">{actions(job, here=False)}</div></td></tr>'
    )
