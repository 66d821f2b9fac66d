"""Chat, `/chat?job=UID&configuration=NAME`: one message, two answers, from the baseline and from a quantized model.

Either side can be a model behind a server instead (`[served]` of the settings), which is asked what it serves when the
page is opened.

Both answers come from one generator: the browser would serve two listeners of one click one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from backend.errors import JobError, QuantdeckError
from backend.jobs.results import full_name, results_of
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.served.address import DEFAULT_URL
from backend.served.known import Found, KnownServers
from backend.settings import Settings
from ui.chat_pair import SERVED, SIDES, ChatPair, chat_key, pair_key, served_key
from ui.format import ago, significant, size
from ui.layout import empty, esc, link, notice, page, plain, prose, title
from ui.reading import briefly, find, store_notice

LEAD = (
    "Ask both models the same thing, with the same sampling and random numbers. They answer at the same time and share "
    "this machine, so each is slower than in the benchmark. Served models draw random numbers of their own."
)
LISTED = 200  # newest finished jobs in the list; any job can be asked for by the address
WORDS = {"baseline": "Baseline", "quantized": "Quantized"}
OWN_BASELINE = ("The model that was quantized", "")

Choices = list[tuple[str, str]]


def build(demo: gr.Blocks, home: Home, pair: ChatPair) -> None:
    """Adds the page to `demo`."""
    servers = KnownServers()
    with page("chat"):
        gr.HTML(title("Chat", LEAD))
        nothing = gr.HTML(visible=False, elem_id="chat-empty")
        with gr.Column(visible=False) as body:
            with gr.Row(elem_classes=["qd-toolbar"]):
                with gr.Column(scale=4, min_width=260):
                    base = gr.Dropdown([OWN_BASELINE], value="", label="Baseline", elem_id="chat-baseline")
                with gr.Column(scale=5, min_width=320):
                    chosen = gr.Dropdown(label="Quantized model", elem_id="chat-job")
                load = gr.Button("Load both models", variant="primary", elem_id="chat-load", min_width=170)
                unload = gr.Button("Unload", elem_id="chat-unload", interactive=False, min_width=100)
            unreachable = gr.HTML(visible=False, elem_id="chat-servers")
            said = gr.HTML(elem_id="chat-said")
            with gr.Row(elem_classes=["qd-split"]):
                heads, bots = {}, {}
                for side in SIDES:
                    with gr.Column(min_width=340):
                        heads[side] = gr.HTML(head_html(side), elem_id=f"head-{side}")
                        bots[side] = gr.Chatbot(
                            show_label=False, height=420, buttons=["copy"], layout="panel", elem_id=f"chat-{side}",
                            elem_classes=["qd-chat"], placeholder="Answers appear here.", feedback_options=None,
                            allow_tags=False,
                        )  # fmt: skip
            with gr.Row(elem_classes=["qd-toolbar"]):
                message = gr.Textbox(
                    label="Message", placeholder="Ask both models", lines=1, max_lines=6, elem_id="message", scale=5,
                    min_width=320,
                )  # fmt: skip
                send = gr.Button("Send", variant="primary", elem_id="send", min_width=100)
                stop = gr.Button("Stop", elem_id="stop", interactive=False, min_width=90)
                clear = gr.Button("Clear", elem_id="clear", min_width=90)
            with gr.Accordion("Sampling", open=False):
                with gr.Row():
                    length = gr.Slider(1, 2048, 128, step=1, label="Longest answer (tokens)", elem_id="max-tokens")
                    temperature = gr.Slider(
                        0, 2, 0, step=0.05, label="Temperature", info="0: always the likeliest token."
                    )
                with gr.Row():
                    top_p = gr.Slider(
                        0.05, 1, 1, step=0.05, label="Top p", info="Draw from the likeliest tokens that sum to this."
                    )
                    seed = gr.Number(0, precision=0, label="Seed", info="Local models draw the same random numbers.")
    history = gr.State([])  # turns: {"user", "baseline", "quantized"}
    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}

    def offer(request: gr.Request, quantized: str | None, baseline: str | None, note: str) -> list[Any]:
        """What can be chosen, by what is known of the servers; what is chosen already stays so."""
        job, name = (request.query_params.get(part) or "" for part in ("job", "configuration"))
        try:
            with briefly():
                jobs = finished(home, job)
        except JobError as error:
            return [gr.HTML(store_notice(error), visible=True), *[gr.skip()] * 7]
        local, served = models_to_choose(jobs), served_to_choose(servers.found)
        if not local and not any(found.models for found in servers.found):
            text = (
                "Chat needs a job that has finished: it talks to the model before and after, side by side. Or a model "
                "server that answers at an address in [served] of quantdeck.toml."
            )
            return [
                gr.HTML(empty("No quantized model yet", text, link("New job", "/new", "primary")), visible=True),
                *[gr.skip()] * 7,
            ]
        choices, baselines = [*local, *served], [OWN_BASELINE, *baselines_to_choose(jobs), *served]
        known, known_baselines = ([key for _, key in listed] for listed in (choices, baselines))
        loaded, _, loaded_baseline = pair.key.partition("\n")
        of_job = next((key for key in known if job and key.startswith(f"{job}/")), "")
        wanted = (quantized, f"{job}/{name}", job, of_job, loaded)
        asked = next((key for key in wanted if key in known), known[0])
        if quantized not in known or baseline not in known_baselines:
            fitting = known_baselines[1] if asked.startswith(SERVED) else ""
            baseline = loaded_baseline if asked == loaded and loaded_baseline in known_baselines else fitting
        ready = pair.key == chat_key(asked, baseline)
        return [
            gr.HTML(visible=False), gr.Column(visible=True), gr.Dropdown(choices=baselines, value=baseline),
            gr.Dropdown(choices=choices, value=asked), gr.HTML(note, visible=bool(note)), gr.Button(interactive=ready),
            *(head_html(side, _facts(pair, side) if ready else "not loaded") for side in SIDES),
        ]  # fmt: skip

    def on_load(request: gr.Request) -> list[Any]:
        return offer(request, None, None, servers_html(servers.found))

    def on_servers(baseline: str | None, quantized: str | None, request: gr.Request) -> list[Any]:
        try:
            note = servers_html(servers.look(Settings.load(home).served.urls))
        except QuantdeckError as error:
            note = notice("error", "No server was asked", error.message)
        return offer(request, quantized, baseline, note)

    def on_choose() -> list[Any]:
        return [[], *([] for _ in SIDES), *(head_html(side) for side in SIDES), ""]

    def loading(key: str) -> Iterator[tuple[str, list[str]]]:
        """Loads the pair; yields what to say and the heads of both panes."""
        if not key:
            raise QuantdeckError("Choose a model first.")
        for words in pair.load(key):
            yield notice("info", words), [head_html(side) for side in SIDES]
        yield "", [head_html(side, _facts(pair, side)) for side in SIDES]

    def on_load_models(baseline: str | None, quantized: str | None) -> Iterator[list[Any]]:
        try:
            for words, panes in loading(chat_key(quantized or "", baseline or "")):
                yield [words, *panes, gr.Button(interactive=False), gr.skip()]
            yield [
                notice("good", "Both models are loaded"),
                gr.skip(),
                gr.skip(),
                gr.Button(interactive=True),
                gr.Button(interactive=True),
            ]
        except QuantdeckError as error:
            yield [
                notice("error", "The models were not loaded", error.message),
                gr.skip(),
                gr.skip(),
                gr.Button(interactive=True),
                gr.Button(interactive=bool(pair.key)),
            ]

    def on_unload() -> list[Any]:
        pair.unload()
        return [
            notice("info", "Both models were unloaded", "Their memory is free again."),
            *(head_html(s) for s in SIDES),
            gr.Button(interactive=False),
        ]

    def on_send(
        baseline: str | None, quantized: str | None, text: str, turns: list[dict[str, str]], *sampling: Any
    ) -> Iterator[list[Any]]:
        """Yields: history, said, heads, panes, message, send, stop, unload."""
        key = chat_key(quantized or "", baseline or "")
        text = (text or "").strip()
        idle = [gr.Button(interactive=True), gr.Button(interactive=False), gr.Button(interactive=bool(pair.key))]
        busy = [gr.Button(interactive=False), gr.Button(interactive=True), gr.Button(interactive=True)]
        if not text:
            yield [turns, notice("info", "Write a message first"), *[gr.skip()] * 5, *idle]
            return
        turn = {"user": text}
        try:
            for words, panes in loading(key):
                yield [turns, words, *panes, *(_shown([*turns, turn], side) for side in SIDES), "", *busy]
            keys = ("max_new_tokens", "temperature", "top_p", "seed")
            options = dict(zip(keys, (int(sampling[0]), *sampling[1:3], int(sampling[3] or 0)), strict=True))
            states: tuple[Any, ...] = ({}, {})
            for states in pair.answer(key, *(_messages(turns, text, side) for side in SIDES), **options):
                turn = {"user": text, **{side: state["text"] for side, state in zip(SIDES, states, strict=True)}}
                panes = [head_html(side, _facts(pair, side, state)) for side, state in zip(SIDES, states, strict=True)]
                yield [turns, "", *panes, *(_shown([*turns, turn], side) for side in SIDES), gr.skip(), *busy]
        except QuantdeckError as error:
            idle[2] = gr.Button(interactive=bool(pair.key))
            yield [
                turns,
                notice("error", "No answer", error.message),
                gr.skip(),
                gr.skip(),
                *(_shown(turns, side) for side in SIDES),
                text,
                *idle,
            ]
            return
        idle[2] = gr.Button(interactive=bool(pair.key))
        memory = {side: pair.memory(side) for side in SIDES}
        panes = [head_html(s, _facts(pair, s, state, memory[s])) for s, state in zip(SIDES, states, strict=True)]
        turns = [*turns, turn]
        yield [turns, _errors(states), *panes, *(_shown(turns, side) for side in SIDES), gr.skip(), *idle]

    def on_stop() -> None:
        pair.stop()

    both_heads, both_bots = list(heads.values()), list(bots.values())
    sending: dict[str, Any] = {
        "fn": on_send,
        "inputs": [base, chosen, message, history, length, temperature, top_p, seed],
        "outputs": [history, said, *both_heads, *both_bots, message, send, stop, unload],
        "concurrency_id": "chat",
        "concurrency_limit": 4,
        **quiet,
    }
    offered = [nothing, body, base, chosen, unreachable, unload, *both_heads]
    # what is here is shown at once; the servers are asked after that
    demo.load(on_load, None, offered, **quiet).then(on_servers, [base, chosen], offered, **quiet)
    for choice in (base, chosen):
        choice.input(on_choose, None, [history, *both_bots, *both_heads, said], **quiet)
    load.click(on_load_models, [base, chosen], [said, *both_heads, load, unload], **quiet)
    unload.click(on_unload, None, [said, *both_heads, unload], **quiet)
    send.click(**sending)
    message.submit(**sending)
    stop.click(on_stop, None, None, queue=False, **quiet)
    clear.click(on_choose, None, [history, *both_bots, *both_heads, said], **quiet)


def finished(home: Home, also: str = "") -> list[Job]:
    """The newest jobs that are over, and one more that is asked for by uid."""
    jobs = JobStore(home).jobs(states=("succeeded", "failed"), limit=LISTED)
    if also and all(job.uid != also for job in jobs) and (asked := find(home, also)):
        jobs.append(asked)
    return jobs


def models_to_choose(jobs: Sequence[Job]) -> Choices:
    """The quantized models of some jobs as lines of the list, and what names them (`pair_key`)."""
    choices = []
    for job in jobs:
        for entry in results_of(job.result):
            if entry.get("artefact"):
                shown = plain(f"{full_name(job, entry)}, {job.model}, {ago(job.created_at)}")
                choices.append((shown, pair_key(job, entry["name"])))
    return choices


def baselines_to_choose(jobs: Sequence[Job]) -> Choices:
    """The models that some jobs quantized, each folder once, by the newest job that names it."""
    found: dict[str, tuple[str, str]] = {}
    for job in jobs:
        folder = (job.result or {}).get("model_dir")
        if folder and folder not in found:
            found[folder] = (plain(f"{job.model}, baseline of {job.job_id}, {ago(job.created_at)}"), job.uid)
    return list(found.values())


def served_to_choose(servers: Sequence[Found]) -> Choices:
    """The models of the servers; a server that cannot be used has a line, too, and is asked again when it is chosen."""
    choices = []
    for server in servers:
        for model in server.models:
            choices.append((plain(f"Served model: {server.url} ({model})"), served_key(server.url, model)))
        if not server.models:
            choices.append((plain(f"Served model: {server.url} (not reachable)"), served_key(server.url, "")))
    return choices


def servers_html(servers: Sequence[Found]) -> str:
    """Why servers cannot be used; empty if all can. Of the address that is tried without being asked for, nothing."""
    named = [server for server in servers if server.reason and server.url != DEFAULT_URL]
    reasons = [f"Not reachable: {prose(server.reason)}" for server in named]
    return f'<p class="qd-muted qd-small">{"<br>".join(reasons)}</p>' if reasons else ""


def head_html(side: str, facts: str = "not loaded") -> str:
    """The line above a pane: which model, and how fast and large it is."""
    css = "qd-base" if side == "baseline" else "qd-quant"
    return (
        f'<div class="qd-pane-head"><strong class="{css}">{WORDS[side]}</strong>'
        f'<span class="qd-muted qd-small" data-facts>{esc(facts)}</span></div>'
    )


def _facts(pair: ChatPair, side: str, state: dict[str, Any] | None = None, memory: int | None = None) -> str:
    state = state or {}
    words = []
    if state.get("tokens_per_s"):
        words.append(f"{significant(state['tokens_per_s'])} tokens/s")
    if state.get("tokens"):
        words.append(f"{state['tokens']} tokens")
    if memory is not None:
        words.append(f"peak memory {size(memory)}")
    if not words:
        info = pair.info(side)
        dtype, path = str(info.get("dtype", "")), str(info.get("decode_path", ""))
        words = [f"loaded in {info['load_s']:.1f} s" if "load_s" in info else "loaded", dtype]
        words += [path] if not dtype or not path.startswith(dtype) else []
    return " · ".join(word for word in words if word)


def _shown(turns: list[dict[str, str]], side: str) -> list[dict[str, str]]:
    """A pane's messages."""
    rows = []
    for turn in turns:
        rows.append({"role": "user", "content": turn["user"]})
        if turn.get(side):
            rows.append({"role": "assistant", "content": turn[side]})
    return rows


def _messages(turns: list[dict[str, str]], text: str, side: str) -> list[dict[str, str]]:
    """What one model is asked: its own side of the conversation so far, and the new message."""
    return [*_shown([turn for turn in turns if turn.get(side)], side), {"role": "user", "content": text}]


def _errors(states: tuple[Any, ...]) -> str:
    found = [(side, state["error"]) for side, state in zip(SIDES, states, strict=True) if state.get("error")]
    return "".join(notice("error", f"{WORDS[side]}: no answer", message) for side, message in found)
