"""Jobs, `/`: the jobs of this home, newest first, a page of them at a time, kept up to date.

The address tells what is shown (`/?state=failed&q=llama&p=3`), so a reload shows the same. Of the jobs on a page
only what the list tells is read; a list of 10,000 costs no more than one of 50.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.jobs import control
from backend.jobs.states import State
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from ui.format import ago
from ui.guard import NO_LOGIN
from ui.jobview import actions, badges, headline, progress_cell, rows_of, run_time
from ui.layout import ACTION_JS, ADDRESS_JS, action, empty, esc, link, notice, page, title
from ui.reading import Results, Told, asked, briefly, scheduler_is_missing, store_notice, whole

REFRESH_S = 2.0
PER_PAGE = 50
MAX_SEARCH = 100
MAX_COMPARED = 6
PATIENCE = 2  # refreshes without a scheduler before it is told; one is started within a second or two
COLUMNS = ("Job", "State", "Algorithm", "Progress", "Started", "Run time", "Result", "")
GROUPS: dict[str, tuple[str, tuple[State, ...]]] = {
    "": ("All", ()),
    "running": ("At work", ("starting", "running", "cancelling")),
    "waiting": ("Waiting", ("queued", "lost")),
    "succeeded": ("Succeeded", ("succeeded",)),
    "failed": ("Failed", ("failed",)),
    "cancelled": ("Cancelled", ("cancelled",)),
}
"""What the list can be narrowed to: key in the address, name, states."""


@dataclass(frozen=True)
class View:
    """What of the list is shown.

    Attributes:
        group: Key of `GROUPS`.
        search: Part of the job's or the model's name.
        page: From 1.
        turn: Number of clicks answered; a new number draws the buttons anew.
    """

    group: str = ""
    search: str = ""
    page: int = 1
    turn: int = 0

    @classmethod
    def of(cls, query: Mapping[str, str]) -> View:
        """What an address asks for; what it asks for wrongly is left out."""
        # Not `page`: Gradio takes that for one of its own pages.
        group, number = query.get("state", ""), query.get("p", "1")
        page = int(number) if number.isascii() and number.isdigit() and len(number) < 8 else 1
        return cls(group if group in GROUPS else "", query.get("q", "")[:MAX_SEARCH], max(1, page))

    @property
    def address(self) -> str:
        """The address that shows this."""
        asked = {"state": self.group, "q": self.search, "p": str(self.page) if self.page > 1 else ""}
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
        counts: Number of jobs by state, whatever is searched.
    """

    view: View
    jobs: list[Job]
    told: dict[str, Told] = field(default_factory=dict)
    groups: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Jobs that match, on all pages."""
        return self.groups.get(self.view.group, len(self.jobs))

    @property
    def pages(self) -> int:
        """Number of pages, at least 1."""
        return max(1, -(-self.total // PER_PAGE))


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("jobs"):
        heading = gr.HTML(title("Jobs"))
        health = gr.HTML(visible=False, elem_id="health")
        said = gr.HTML(visible=False, elem_id="said")
        with gr.Row(elem_classes=["qd-toolbar", "qd-list-tools"]):
            filters = gr.HTML(js_on_load=ACTION_JS, elem_id="filters")
            search = gr.Textbox(
                show_label=False, label="Search", placeholder="Search by name or model", max_lines=1, elem_id="search",
                max_length=MAX_SEARCH, scale=0, min_width=300,
            )  # fmt: skip
        table = gr.HTML(js_on_load=ACTION_JS + ADDRESS_JS, elem_id="jobs")
    view = gr.State(View())  # changed by the visitor only, so that no refresh can bring an older one back
    seen = gr.State({})
    timer = gr.Timer(REFRESH_S)
    results = Results()
    drawn = [heading, health, filters, table, seen]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def refresh(view: View, search: str | None, before: dict[str, Any]) -> list[Any]:
        """What has changed: heading, health, filters, table, and what is shown now."""
        view = searched(view, search)
        try:
            with briefly():
                listing = read_list(home, view, results)
            lonely = before.get("lonely", 0) + 1 if scheduler_is_missing(home, listing.counts) else 0
        except JobError as error:
            return [gr.skip(), gr.HTML(store_notice(error), visible=True), gr.skip(), gr.skip(), {"trouble": True}]
        waits = lonely >= PATIENCE
        parts = [title_html(listing), scheduler_html() if waits else "", filters_html(listing), table_html(listing)]
        now = {"digest": digest(*parts), "lonely": lonely}
        if now["digest"] == before.get("digest"):
            return [*[gr.skip()] * 4, now]
        return [parts[0], gr.HTML(parts[1], visible=waits), *parts[2:], now]

    def on_load(request: gr.Request) -> list[Any]:
        view = View.of(request.query_params)
        return [view, view.search, *refresh(view, view.search, {})]

    def on_action(view: View, search: str | None, event: gr.EventData, request: gr.Request) -> list[Any]:
        act, what = asked(event)
        view = replace(searched(view, search), turn=view.turn + 1)
        if act in ("filter", "page", "clear"):
            return [moved(view, act, what), "" if act == "clear" else search, gr.HTML(visible=False)]
        try:
            with briefly():
                told = notice("info", act_on(home, act, what, actor=actor_of(request)))
        except QuantdeckError as error:
            told = notice("error", "Nothing was changed", error.message)
        return [view, gr.skip(), gr.HTML(told, visible=True)]

    everything = [view, search, seen]
    demo.load(on_load, None, [view, search, *drawn], **quiet)
    timer.tick(refresh, everything, drawn, **quiet)
    # Gradio's `input` misses what is pasted or deleted.
    search.change(refresh, everything, drawn, trigger_mode="always_last", **quiet)
    for part in (filters, table):
        part.click(on_action, [view, search], [view, search, said], **quiet).then(refresh, everything, drawn, **quiet)


def digest(*parts: str) -> str:
    """A short text that differs where the parts differ; all that a visitor's session keeps of them."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def searched(view: View, search: str | None) -> View:
    """The view with what stands in the search box; another search begins at its first page."""
    text = whole(search or "")[:MAX_SEARCH].strip()
    return view if text == view.search else replace(view, search=text, page=1)


def moved(view: View, act: str, what: str) -> View:
    """The view after a click on a filter or a page; nonsense leads to the first page of all jobs."""
    if act == "page":
        return replace(view, page=View.of({"p": what}).page)
    search = "" if act == "clear" else view.search
    return replace(view, group=what if what in GROUPS else "", search=search, page=1)


def actor_of(request: gr.Request) -> str:
    """Who asks, for a job's history: `user`, with the account's name where there are accounts."""
    return "user" if request.username in (None, NO_LOGIN) else f"user {request.username}"


def act_on(home: Home, act: str, uid: str, *, actor: str = "user") -> str:
    """Do what a button of a job's row or page stands for; returns what to say.

    Raises:
        QuantdeckError: If there is no such action or job, or the job's state does not allow it any more.
    """
    if not uid:
        raise JobError("the page did not say which job is meant; reload it")
    if act == "cancel":
        job = control.cancel(home, uid, actor=actor)
        return f"Job {job.job_id} " + ("was cancelled" if job.state == "cancelled" else "is being stopped")
    if act == "resume":
        job = control.resume(home, uid, actor=actor)
        return f"Job {job.job_id} goes on where it stopped (attempt {job.attempt})"
    if act == "measure":
        job = control.resume(home, uid, redo="measure", actor=actor)
        return f"Job {job.job_id} is measured again (attempt {job.attempt})"
    raise JobError(f"there is no action {act[:40]!r}")


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
    counts = store.counts()
    if view.search:
        groups = {key: store.count(states, view.search) for key, (_, states) in GROUPS.items() if key}
    else:
        groups = {key: sum(counts.get(state, 0) for state in states) for key, (_, states) in GROUPS.items() if key}
    groups[""] = sum(groups.values())
    last = max(1, -(-groups[view.group] // PER_PAGE))
    view = replace(view, page=min(view.page, last))
    asked: dict[str, Any] = {"states": GROUPS[view.group][1], "search": view.search}
    asked |= {"limit": PER_PAGE, "offset": (view.page - 1) * PER_PAGE}
    jobs = store.summaries(**asked)
    known = {job.uid: results.get(job) for job in jobs if job.state == "succeeded"}
    if not all(known.values()):
        for job in store.jobs(**asked):
            if job.state == "succeeded":
                told = Told(headline(job), bool(rows_of(job)))
                results.put(job, told)
                known[job.uid] = told
    told_of = {uid: told for uid, told in known.items() if told}
    return Listing(view, jobs, told_of, groups, counts)


def title_html(listing: Listing) -> str:
    """The heading with what is going on, and the ways to start and to compare."""
    counts = listing.counts
    if not sum(counts.values()):
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
    """The states to choose from, each with its number of jobs."""
    if not sum(listing.counts.values()):
        return ""
    chips = "".join(
        f'<button type="button" class="qd-chip" data-act="filter" data-uid="{key}" '
        f'aria-pressed="{"true" if key == listing.view.group else "false"}" data-turn="{listing.view.turn}">'
        f"{esc(name)} <b>{listing.groups.get(key, 0):,}</b></button>"
        for key, (name, _) in GROUPS.items()
    )
    return f'<div class="qd-chips" role="group" aria-label="Jobs by state">{chips}</div>'


def table_html(listing: Listing) -> str:
    """The jobs as a table with the way to other pages; without any job, the way to the first one."""
    address = f' data-address="{esc(listing.view.address)}" data-turn="{listing.view.turn}"'
    if not sum(listing.counts.values()) and not listing.jobs:
        first = empty(
            "No jobs yet",
            "A job takes a language model, makes it smaller, and measures what that cost: perplexity, accuracy, size "
            "and speed, before and after. The built-in demo model takes the whole path on this machine, without a "
            "download and without a GPU.",
            link("Start with the demo", "/new", "primary"),
        )
        return f"<div{address}>{first}</div>"
    if not listing.jobs:
        nothing = empty("No job matches", "No job has such a name, model and state.", action("Show all", "clear", ""))
        return f"<div{address}>{nothing}</div>"
    body = "".join(_row(job, listing.told.get(job.uid)) for job in listing.jobs)
    head = "".join(f"<th>{word}</th>" for word in COLUMNS)
    return (
        f'<div class="qd-card qd-flush"{address}><div class="qd-scroll"><table class="qd-table"><thead><tr>{head}</tr>'
        f"</thead><tbody>{body}</tbody></table></div>{pager_html(listing)}</div>"
    )


def pager_html(listing: Listing) -> str:
    """Which jobs are shown of how many, and the way to others; nothing if all are shown."""
    if listing.pages == 1:
        return ""
    number, last = listing.view.page, listing.pages
    first = (number - 1) * PER_PAGE + 1
    ways = (("First", 1, number > 1), ("Newer", number - 1, number > 1))
    ways += (("Older", number + 1, number < last), ("Last", last, number < last))
    buttons = "".join(
        f'<button type="button" class="qd-button qd-secondary" data-act="page" data-uid="{to}"'
        f"{'' if there else ' disabled'}>{name}</button>"
        for name, to, there in ways
    )
    return (
        f'<div class="qd-pager"><span>{first:,} to {first + len(listing.jobs) - 1:,} of {listing.total:,} jobs, '
        f'page {number:,} of {last:,}</span><span class="qd-row-actions">{buttons}</span></div>'
    )


def _row(job: Job, told: Told | None) -> str:
    priority = f'<span class="qd-sub">priority {job.priority}</span>' if job.priority else ""
    return (
        f'<tr data-job="{esc(job.job_id)}"><td><a class="qd-name" href="/job?id={esc(job.uid)}">{esc(job.job_id)}</a>'
        f'<span class="qd-sub">{esc(job.model)}</span></td><td>{badges(job)}{priority}</td>'
        f"<td>{esc(job.algorithm)}</td><td>{progress_cell(job)}</td>"
        f'<td class="qd-nowrap">{esc(ago(job.started_at or job.created_at))}</td>'
        f'<td class="qd-nowrap">{esc(run_time(job))}</td><td>{told.headline if told else headline(job)}</td>'
        f'<td><div class="qd-row-actions">{actions(job, here=False)}</div></td></tr>'
    )
