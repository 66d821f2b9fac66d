"""Engines, `/engines`: what can run here and what not, with the reason; environments are installed from here.

An installation is a process of its own with its log in a file: a page that is closed ends nothing, and every page
shows the same.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.engines import installing, status
from backend.engines.environments import environments
from backend.errors import QuantdeckError
from backend.paths import Home
from backend.settings import Settings
from ui.enginesview import engines_table, environment_card, log_html, machine_html
from ui.layout import ACTION_JS, card, notice, page, title
from ui.pages.jobs import digest
from ui.reading import asked

REFRESH_S = 1.0
LEAD = "Which programs quantize here, for which algorithm, and what is missing for the others."
ASKING = "Asking the driver and docker ..."

Seen = dict[str, Any]  # digests of what this page shows, sizes of environments, number of clicks


def build(demo: gr.Blocks, home: Home) -> None:
    """Adds the page to `demo`."""
    names = list(environments())
    with page("engines"):
        gr.HTML(title("Engines", LEAD))
        said = gr.HTML(visible=False)
        table = gr.HTML(elem_id="engines")
        gr.HTML('<div class="qd-section"><h2>Environments</h2></div>')
        cards, logs = [], []
        for name in names:
            cards.append(gr.HTML(js_on_load=ACTION_JS, elem_id=f"environment-{name}"))
            logs.append(
                gr.HTML(visible=False, autoscroll=True, max_height=320, elem_id=f"log-{name}", elem_classes=["qd-card"])
            )
        gr.HTML('<div class="qd-section"><h2>This machine</h2></div>')
        machine = gr.HTML(card(f"<p>{ASKING}</p>"), elem_id="machine")
    seen = gr.State({})
    timer = gr.Timer(REFRESH_S)
    outputs = [seen, timer, table, *cards, *logs]
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def show(now: Seen) -> list[Any]:
        """Everything that changed since this page was last updated."""
        now = dict(now)
        known = environments()
        found = [(known[name], installing.look(home, name)) for name in names]
        sizes = now.get("sizes", {})
        turn = now.get("turn", 0)
        told = [_changed(now, "table", engines_table(status.engine_rows()))]
        told += [
            _changed(now, f"card {env.name}", environment_card(env, state, sizes.get(env.name), turn))
            for env, state in found
        ]
        told += [_changed(now, f"log {env.name}", log_html(state)) for env, state in found]
        busy = any(state.state == "running" for _, state in found)
        return [now, gr.Timer(REFRESH_S, active=busy), *told]

    def on_load() -> list[Any]:
        return show({})

    def on_machine(now: Seen) -> tuple[str, Seen]:
        packages = status.own_packages()
        try:
            facts = status.machine(Settings.load(home), list(environments().values()))
        except QuantdeckError as error:
            return notice("error", "The machine was not examined", error.message), now
        return machine_html(facts, packages), {**now, "sizes": facts.sizes}

    def on_install(now: Seen, event: gr.EventData) -> tuple[Any, Seen]:
        act, name = asked(event)
        again = {**now, "turn": now.get("turn", 0) + 1}  # redraws the button
        if act != "install" or name not in names:
            return gr.HTML(notice("error", "Nothing was started", "Reload this page."), visible=True), again
        try:
            installing.start(home, name)  # if it runs already, this page shows that log
        except (QuantdeckError, OSError) as error:
            text = (
                error.message if isinstance(error, QuantdeckError) else f"the log cannot be written: {error.strerror}"
            )
            return gr.HTML(notice("error", "Nothing was started", text), visible=True), again
        return gr.HTML(visible=False), again

    demo.load(on_load, None, outputs, **quiet).then(on_machine, [seen], [machine, seen], **quiet).then(
        show, [seen], outputs, **quiet
    )
    timer.tick(show, [seen], outputs, **quiet)
    for shown in cards:
        shown.click(on_install, [seen], [said, seen], **quiet).then(show, [seen], outputs, **quiet)


def _changed(now: Seen, name: str, html: str) -> Any:
    shown = digest(html)
    if now.get(name) == shown:
        return gr.skip()
    now[name] = shown
    return gr.HTML(html, visible=bool(html))
