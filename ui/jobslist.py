"""Which jobs the list of jobs shows: what its address asks for, and what is read of the store for it.

Of the jobs on a page only what the list tells is read; a list of 10,000 costs no more than one of 50.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

from backend.jobs.labels import TAG
from backend.jobs.listing import is_sort
from backend.jobs.states import State
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.jobview import headline, rows_of
from ui.reading import Results, Told, whole

PER_PAGE = 50
MAX_SEARCH = 100
DELETED = "deleted"
GROUPS: dict[str, tuple[str, tuple[State, ...]]] = {
    "": ("All", ()),
    "running": ("At work", ("starting", "running", "cancelling")),
    "waiting": ("Waiting", ("queued", "lost")),
    "succeeded": ("Succeeded", ("succeeded",)),
    "failed": ("Failed", ("failed",)),
    "cancelled": ("Cancelled", ("cancelled",)),
    DELETED: ("Deleted", ()),
}
"""What the list can be narrowed to: key in the address, name, states. Deleted jobs are in their own group alone."""
DOWNWARDS_FIRST = ("started", "time")
"""Of these the last or longest is looked for, of all others the first."""


@dataclass(frozen=True)
class View:
    """What of the list is shown.

    Attributes:
        group: Key of `GROUPS`.
        search: Words, and tags as `tag:sweep`.
        page: From 1.
        turn: Number of clicks answered; a new number draws the buttons anew.
        sort: One of `listing.SORTS`, with `-` before it for downwards; empty for the newest first.
    """

    group: str = ""
    search: str = ""
    page: int = 1
    turn: int = 0
    sort: str = ""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> View:
        """What an address asks for; what it asks for wrongly is left out."""
        # Not `page`: Gradio takes that for one of its own pages.
        group, number, sort = query.get("state", ""), query.get("p", "1"), query.get("sort", "")
        page = int(number) if number.isascii() and number.isdigit() and len(number) < 8 else 1
        return cls(
            group if group in GROUPS else "", query.get("q", "")[:MAX_SEARCH], max(1, page),
            sort=sort if is_sort(sort) else "",
        )  # fmt: skip

    @property
    def address(self) -> str:
        """The address that shows this."""
        asked = {"state": self.group, "q": self.search, "sort": self.sort, "p": str(self.page) if self.page > 1 else ""}
        query = urlencode({key: value for key, value in asked.items() if value}, errors="replace")
        return f"/?{query}" if query else "/"


@dataclass(frozen=True)
class Listing:
    """A page of jobs.

    Attributes:
        view: What is shown; its page exists.
        jobs: The jobs of that page, without results.
        told: By uid, what the list tells of results.
        groups: By key of `GROUPS`, how many jobs match the search.
        counts: Number of jobs by state, whatever is searched; deleted ones are not among them.
        deleted: Number of deleted jobs, whatever is searched.
    """

    view: View
    jobs: list[Job]
    told: dict[str, Told] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    deleted: int = 0

    @property
    def total(self) -> int:
        """Jobs that match, on all pages."""
        return self.groups.get(self.view.group, len(self.jobs))

    @property
    def pages(self) -> int:
        """Number of pages, at least 1."""
        return max(1, -(-self.total // PER_PAGE))

    @property
    def is_new(self) -> bool:
        """Whether there never was a job that could be shown."""
        return not sum(self.counts.values()) and not self.jobs and not self.deleted


def searched(view: View, search: str | None) -> View:
    """The view with what stands in the search box; another search begins at its first page."""
    text = whole(search or "")[:MAX_SEARCH].strip()
    return view if text == view.search else replace(view, search=text, page=1)


def moved(view: View, act: str, what: str) -> View:
    """The view after a click on a filter, a page, a column or a tag; nonsense leads to the first page of all jobs."""
    if act == "page":
        return replace(view, page=View.of({"p": what}).page)
    if act == "sort":
        return replace(view, sort=next_sort(view.sort, what), page=1)
    if act == "tag":
        return replace(view, search=f"tag:{what}" if TAG.fullmatch(what) else "", page=1)
    search = "" if act == "clear" else view.search
    return replace(view, group=what if what in GROUPS else "", search=search, page=1)


def next_sort(sort: str, column: str) -> str:
    """The order after a click on a column's head: by it, by it the other way, and then the newest first again."""
    if not column or column.startswith("-") or not is_sort(column):
        return ""
    ways = (f"-{column}", column) if column in DOWNWARDS_FIRST else (column, f"-{column}")
    return {ways[0]: ways[1], ways[1]: ""}.get(sort, ways[0])


def read_list(home: Home, view: View, results: Results) -> Listing:
    """A page of jobs; a page that does not exist becomes the last one.

    Args:
        home: The home.
        view: What to show.
        results: What is known of results already; completed by this.

    Raises:
        JobError: If the store cannot be read.
    """
    store = JobStore(home)
    counts, deleted = store.counts(), store.count(deleted=True)
    listed = {key: states for key, (_, states) in GROUPS.items() if key and key != DELETED}
    if view.search:
        groups = {key: store.count(states, view.search) for key, states in listed.items()}
    else:
        groups = {key: sum(counts.get(state, 0) for state in states) for key, states in listed.items()}
    groups[""] = sum(groups.values())
    groups[DELETED] = store.count((), view.search, deleted=True) if view.search and deleted else deleted
    last = max(1, -(-groups[view.group] // PER_PAGE))
    view = replace(view, page=min(view.page, last))
    asked: dict[str, Any] = {"states": GROUPS[view.group][1], "search": view.search, "sort": view.sort}
    asked |= {"deleted": view.group == DELETED, "limit": PER_PAGE, "offset": (view.page - 1) * PER_PAGE}
    jobs = store.summaries(**asked)
    known = {job.uid: results.get(job) for job in jobs if job.state == "succeeded"}
    if not all(known.values()):
        for job in store.jobs(**asked):
            if job.state == "succeeded":
                told = Told(headline(job), bool(rows_of(job)))
                results.put(job, told)
                known[job.uid] = told
    told_of = {uid: told for uid, told in known.items() if told}
    return Listing(view, jobs, told_of, groups, counts, deleted)
