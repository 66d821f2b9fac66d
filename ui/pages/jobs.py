"""Jobs, `/`: the jobs of this home, newest first, a page of them at a time, kept up to date.

The address tells what is shown (`/?state=failed&q=llama&sort=-time&p=3`), so a reload shows the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.paths import Home
from ui.guard import NO_LOGIN
from ui.jobactions import OF_MANY, act_on, act_on_many, chosen
from ui.jobslist import MAX_SEARCH, View, moved, read_list, searched
from ui.jobstable import SAID_JS, SELECT_JS, filters_html, scheduler_html, table_html, title_html
from ui.layout import ACTION_JS, ADDRESS_JS, notice, page, title
from ui.reading import Results, asked, briefly, scheduler_is_missing, store_notice

REFRESH_S = 2.0
PATIENCE = 2  # refreshes without a scheduler before it is told; one is started within a second or two


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    with page("jobs"):
        heading = gr.HTML(title("Jobs"))
        health = gr.HTML(visible=False, elem_id="health")
        said = gr.HTML(visible=False, js_on_load=ACTION_JS + SAID_JS, elem_id="said")
        with gr.Row(elem_classes=["qd-toolbar", "qd-list-tools"]):
            filters = gr.HTML(js_on_load=ACTION_JS, elem_id="filters")
            search = gr.Textbox(
                show_label=False, label="Search", placeholder="Name, model, note or tag:word", max_lines=1,
                elem_id="search", max_length=MAX_SEARCH, scale=0, min_width=300,
            )  # fmt: skip
        table = gr.HTML(js_on_load=ACTION_JS + ADDRESS_JS + SELECT_JS, elem_id="jobs")
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
        if act in ("filter", "page", "clear", "sort", "tag"):
            view = moved(view, act, what)
            return [view, view.search if act in ("clear", "tag") else search, gr.HTML(visible=False)]
        if act == "dismiss":
            return [view, gr.skip(), gr.HTML(visible=False)]
        try:
            with briefly():
                if act in OF_MANY:
                    told = act_on_many(home, act, chosen(event, what), actor=actor_of(request))
                else:
                    told = notice("info", act_on(home, act, what, actor=actor_of(request)))
        except QuantdeckError as error:
            told = notice("error", "Nothing was changed", error.message)
        return [view, gr.skip(), gr.HTML(told, visible=True)]

    everything = [view, search, seen]
    demo.load(on_load, None, [view, search, *drawn], **quiet)
    timer.tick(refresh, everything, drawn, **quiet)
    # Gradio's `input` misses what is pasted or deleted.
    search.change(refresh, everything, drawn, trigger_mode="always_last", **quiet)
    for part in (filters, table, said):
        part.click(on_action, [view, search], [view, search, said], **quiet).then(refresh, everything, drawn, **quiet)


def digest(*parts: str) -> str:
    """A short text that differs where the parts differ; all that a visitor's session keeps of them."""
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=16).hexdigest()


def actor_of(request: gr.Request) -> str:
    """Who asks, for a job's history: `user`, with the account's name where there are accounts."""
    return "user" if request.username in (None, NO_LOGIN) else f"user {request.username}"
