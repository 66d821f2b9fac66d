"""The model on the page New job: found on the Hub or in the cache, and told what it is before anything is downloaded.

The browser asks only us; we ask the Hub, and only when somebody searches or names one of its models.
"""

from __future__ import annotations

import os
from typing import Any

import gradio as gr

from backend.errors import ConfigError, ConfigErrors, QuantdeckError
from backend.paths import Home
from backend.schema import JobConfig
from backend.schema.job import is_revision
from backend.sources import hub, hub_cache, hub_token
from backend.sources.hub_errors import HubUnreachable
from backend.sources.models import ModelFacts, is_repo_id, model_facts, resolve_model
from ui.format import count, size
from ui.hublist import found_html
from ui.layout import ACTION_JS, esc, facts, link, notice
from ui.reading import asked, whole
from ui.review import model_html

SHORTEST_TYPED = 3
# A model may be taken more than once, so its button stays enabled.
PICK_JS = ACTION_JS.replace("  button.disabled = true;\n", "")
HUB = "https://huggingface.co"
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}


class ModelPicker:
    """The facts of the chosen model and, below, the box in which one is found. Made where it is to stand."""

    def __init__(self) -> None:
        self.facts = gr.HTML(elem_id="model-facts")
        self.pin = gr.Button("Pin this commit", size="sm", visible=False, elem_id="model-pin")
        with gr.Accordion("Find on the Hub", open=False, elem_id="hub") as self.box:
            with gr.Row(elem_classes=["qd-hub-search"]):
                self.text = gr.Textbox(
                    label="Name of a model", placeholder="e.g. Qwen3 0.6B", max_lines=1, elem_id="hub-text",
                    info="Text-generation models, the most downloaded first. Empty: what is in the cache here.",
                )  # fmt: skip
                self.search = gr.Button("Search", scale=0, min_width=110, elem_id="hub-search")
            self.results = gr.HTML(js_on_load=PICK_JS, elem_id="hub-results")
            with gr.Accordion("Token for gated and private models", open=False, elem_id="hub-token"):
                self.status = gr.HTML(elem_id="hub-token-status")
                self.token = gr.Textbox(
                    label="Token", type="password", max_lines=1, elem_id="hub-token-text",
                    info="From Settings, Access Tokens, on the Hub; the right to read is enough. It is kept in a "
                    "private file of this machine, used by searches, previews and downloads, and never shown again.",
                )  # fmt: skip
                with gr.Row():
                    self.save = gr.Button("Save token", size="sm", elem_id="hub-token-save")
                    self.clear = gr.Button("Remove token", size="sm", elem_id="hub-token-clear")

    def connect(self, demo: gr.Blocks, home: Home, controls: dict[str, Any]) -> None:
        """Attach the handlers.

        Args:
            demo: The app.
            home: Where the cache and the token are.
            controls: The form's, by dotted key.
        """
        model, revision = controls["MODEL"], controls["REVISION"]
        cache = controls["CACHE_PATH"]
        chosen = [model, controls["CUSTOM_MODEL_PATH"], revision, cache]

        def show_model(model: str, custom: str, revision: str, cache: str = "") -> tuple[Any, Any]:
            """At once: what needs no network, and what was asked a short while ago."""
            return described(home, model, custom, revision, cache, ask=False)

        def ask_model(model: str, custom: str, revision: str, cache: str = "") -> tuple[Any, Any]:
            return described(home, model, custom, revision, cache, ask=True)

        def on_pin(model: str, custom: str, revision: str, cache: str = "") -> Any:
            name, asked_for = _hub_name(home, model, custom), _text(revision) or None
            try:
                found = name and hub.known(home, name, asked_for) and hub.inspect(home, name, asked_for)
            except QuantdeckError:
                return gr.skip()
            return found.commit if found else gr.skip()

        def on_typed(text: str, cache: str = "") -> Any:
            text = _text(text)
            return found_html(home, text, _text(cache)) if not text or len(text) >= SHORTEST_TYPED else gr.skip()

        def on_search(text: str, cache: str = "") -> str:
            return found_html(home, _text(text), _text(cache))

        def on_pick(event: gr.EventData) -> tuple[Any, Any]:
            act, what = asked(event)
            name, _, commit = what.partition("@")
            if act != "use" or not is_repo_id(name) or (commit and not is_revision(commit)):
                return gr.skip(), gr.skip()
            return name, commit

        def on_open(cache: str = "") -> tuple[str, str]:
            return found_html(home, "", _text(cache)), status_html(home)

        def on_token(text: str) -> tuple[str, Any]:
            try:
                hub_token.save(home, _text(text))
            except QuantdeckError as error:
                return notice("error", "The token was not stored", error.message), gr.skip()
            return status_html(home), ""

        def on_forget() -> str:
            try:
                hub_token.clear(home)
            except OSError as error:
                return notice("error", "The token was not removed", str(error.strerror))
            return status_html(home)

        latest: dict[str, Any] = {"trigger_mode": "always_last", **QUIET}
        told = [self.facts, self.pin]
        changes = [demo.load, *(control.change for control in chosen)]
        gr.on(changes, show_model, chosen, told, queue=False, **latest)
        # In the queue, since the Hub may take its time; asked again with what is chosen when it answered at last.
        gr.on(changes, ask_model, chosen, told, concurrency_limit=3, **latest)
        self.pin.click(on_pin, chosen, [revision], queue=False, **QUIET)
        # Gradio's `input` misses what is pasted or deleted.
        searched = [self.text, cache]
        self.text.change(on_typed, searched, [self.results], concurrency_limit=3, concurrency_id="hub", **latest)
        gr.on(
            [self.search.click, self.text.submit], on_search, searched, [self.results],
            concurrency_limit=3, concurrency_id="hub", trigger_mode="always_last",
            show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        self.results.click(on_pick, None, [model, revision], queue=False, **QUIET)
        self.box.expand(on_open, [cache], [self.results, self.status], **QUIET)
        gr.on([self.save.click, self.token.submit], on_token, [self.token], [self.status, self.token], **QUIET)
        self.clear.click(on_forget, None, [self.status], **QUIET)


def _text(value: object) -> str:
    """What a text field sends; empty for anything else, which no page of ours sends."""
    return whole(value).strip() if isinstance(value, str) else ""


def _hub_name(home: Home, model: str, custom: str) -> str | None:
    """The Hub model that is chosen; None if it is a local one, or none."""
    probe = JobConfig.model_construct(MODEL=_text(model), CUSTOM_MODEL_PATH=_text(custom) or None)
    try:
        source = resolve_model(probe, home, confined=True)
    except ConfigErrors:
        return None
    return source.id if source.kind == "hub" else None


def described(home: Home, model: str, custom: str, revision: str, cache: str = "", *, ask: bool) -> tuple[Any, Any]:
    """What the chosen model is, and whether its commit can be pinned.

    Args:
        home: Where the cache and the token are.
        model: As the form has it.
        custom: `CUSTOM_MODEL_PATH`, likewise.
        revision: Likewise.
        cache: `CACHE_PATH`, likewise.
        ask: Whether the Hub may be asked; otherwise only what is known already is told.
    """
    hidden = gr.update(visible=False)
    model, custom, revision = _text(model), _text(custom), _text(revision)
    name = _hub_name(home, model, custom)
    if name is None:
        return model_html(home, model, custom), hidden
    try:
        if not ask and not hub.known(home, name, revision or None):
            return notice("info", f"{name} comes from the Hugging Face Hub", "Asking the Hub what it is …"), hidden
        found = hub.inspect(home, name, revision or None)
    except HubUnreachable as error:
        return cached_html(home, name, revision or None, error.message, _text(cache)), hidden
    except ConfigError as error:
        return notice("error", "This model cannot be used", error.message), hidden
    except QuantdeckError as error:
        page = link("Open its page on the Hub", _page(name), target="_blank", rel="noreferrer")
        return notice("warn", "This model cannot be used yet", error.message) + page, hidden
    return inspected_html(found), gr.update(visible=revision != found.commit)


def _page(name: str) -> str:
    return f"{os.environ.get('HF_ENDPOINT', HUB).rstrip('/')}/{name}"


def inspected_html(found: hub.Inspected) -> str:
    """The facts of a model on the Hub, and why it cannot be quantized if it cannot."""
    model = found.model
    refused = notice("error", "This model cannot be quantized", model.refused) if model.refused else ""
    closed = (
        notice("warn", "Its licence has to be accepted first", "On its page on the Hub; then a token opens it.")
        if model.gated and found.facts is None
        else ""
    )
    rows = _fact_rows(found.facts) if found.facts else [("Architecture", model.architecture or "-")]
    rows += [("Licence", model.licence or "not told"), ("Commit", found.commit[:12])]
    return refused + closed + facts(rows)


def _fact_rows(found: ModelFacts) -> list[tuple[str, str]]:
    return [
        ("Architecture", found.architecture),
        ("Layers", str(found.layers)),
        ("Hidden size", f"{found.hidden_size:,}"),
        ("Vocabulary", f"{found.vocab_size:,}"),
        ("Parameters", count(found.parameters)),
        ("Weights to download", f"{size(found.weight_bytes)}, {found.dtype}"),
    ]


def cached_html(home: Home, name: str, revision: str | None, reason: str, cache: str = "") -> str:
    """A Hub model while the Hub cannot be asked: what the cache has of it."""
    kept = hub_cache.find_cached(home, name, revision, cache)
    try:
        found = model_facts(kept.folder) if kept else None
    except QuantdeckError:
        found = None
    if kept is None or found is None:
        return notice("warn", f"{name} is not in the cache, and the Hub cannot be asked", reason)
    rows = [(label.replace("Weights to download", "Weights"), value) for label, value in _fact_rows(found)]
    told = notice("info", f"{name} is in the cache", "The Hub cannot be asked now; a job uses this copy.")
    return told + facts([*rows, ("Commit", kept.commit[:12])])


def status_html(home: Home) -> str:
    """Whether there is a token, and nothing of it."""
    try:
        text = hub_token.status(home)
    except QuantdeckError as error:
        return notice("error", "The stored token cannot be used", error.message)
    return f'<p class="qd-muted qd-small">{esc(text)}.</p>'
