"""Tags and note of a job on its page: a small folded part where they are read and changed."""

from __future__ import annotations

from typing import Any

import gradio as gr

from backend.errors import ConfigError, JobError
from backend.jobs import labels
from backend.jobs.store import Job
from backend.paths import Home
from ui.layout import notice, plain
from ui.reading import briefly, find, whole


def add_labels(demo: gr.Blocks, home: Home, seen: gr.State) -> None:
    """Adds the part at the present place of a job's page.

    Args:
        demo: The site.
        home: The home.
        seen: What the page shows; its `uid` is the job.
    """
    with gr.Accordion("Tags and note", open=False, elem_id="labels") as box:
        said = gr.HTML(visible=False)
        tags = gr.Textbox(
            label="Tags", max_lines=1, max_length=labels.MAX_TAGS * (labels.MAX_TAG + 2), elem_id="tags",
            info=f"At most {labels.MAX_TAGS} words with spaces between, e.g. sweep w4. The list of jobs is narrowed by "
            "them.",
        )  # fmt: skip
        note = gr.Textbox(
            label="Note", lines=3, max_lines=12, max_length=labels.MAX_NOTE, elem_id="note",
            info=f"Plain text, at most {labels.MAX_NOTE:,} characters. The search in the list finds its words.",
        )  # fmt: skip
        with gr.Row():
            save = gr.Button("Save", size="sm", scale=0, min_width=120, elem_id="save-labels")
    quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}

    def on_labels(request: gr.Request) -> list[Any]:
        """The labels of the job that the address names, as they are stored."""
        try:
            with briefly():
                job = find(home, request.query_params.get("id", ""))
        except JobError:
            job = None  # the page itself says that the store cannot be read
        return [gr.skip()] * 3 if job is None else shown(job)

    def on_save(now: dict[str, Any], words: str | None, text: str | None) -> list[Any]:
        try:
            with briefly():
                job = labels.change(home, str(now.get("uid") or ""), tags=whole(words or ""), note=whole(text or ""))
        except (ConfigError, JobError) as error:
            told = notice("error", "Tags and note were not changed", plain(error.message))
            return [gr.skip(), gr.skip(), gr.skip(), gr.HTML(told, visible=True)]
        return [*shown(job), gr.HTML(notice("good", "Saved"), visible=True)]

    def on_change() -> Any:
        """What was said of the last save is not of what is typed now."""
        return gr.HTML(visible=False)

    demo.load(on_labels, None, [box, tags, note], **quiet)
    save.click(on_save, [seen, tags, note], [box, tags, note, said], **quiet)
    for part in (tags, note):
        part.input(on_change, None, said, **quiet)


def shown(job: Job) -> list[Any]:
    """The folded part's heading, the tags and the note of a job."""
    words = ", ".join(job.tags) + (" and a note" if job.tags and job.note else "a note" if job.note else "")
    return [gr.Accordion(label=f"Tags and note: {words}" if words else "Tags and note"), " ".join(job.tags), job.note]
