"""Puts the pages together into one Gradio application."""

from __future__ import annotations

import gradio as gr

from backend.paths import Home
from ui.api import add_api
from ui.chat_pair import ChatPair
from ui.pages import chat, compare, engines, job, jobs, new_job

UPLOADS_KEPT_S = (3600, 24 * 3600)
"""How often Gradio looks for uploaded files to delete, and how old they are then; at its end it deletes all."""


def build_site(home: Home, pair: ChatPair) -> gr.Blocks:
    """All pages, `/` jobs, `/new`, `/job?id=`, `/compare?jobs=`, `/chat?job=`, `/engines`, and programs' endpoints."""
    with gr.Blocks(title="Quantdeck", analytics_enabled=False, delete_cache=UPLOADS_KEPT_S) as demo:
        jobs.build(demo, home)
        add_api(home)
    with demo.route("New job", "new", show_in_navbar=False):
        new_job.build(demo, home)
    with demo.route("Job", "job", show_in_navbar=False):
        job.build(demo, home)
    with demo.route("Compare", "compare", show_in_navbar=False):
        compare.build(demo, home)
    with demo.route("Chat", "chat", show_in_navbar=False):
        chat.build(demo, home, pair)
    with demo.route("Engines", "engines", show_in_navbar=False):
        engines.build(demo, home)
    demo.queue(default_concurrency_limit=8, max_size=200)
    return demo
