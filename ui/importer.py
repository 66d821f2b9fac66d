"""Opens a job file in the form: uploaded, pasted, or given by its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.components import Component
from gradio.events import Dependency

from backend.errors import ConfigError, QuantdeckError
from backend.schema import parse_file
from backend.schema.document import decode_yaml
from backend.schema.json_text import is_json
from backend.schema.yaml_text import MAX_BYTES
from ui.draft import FIELDS, open_draft
from ui.importview import import_html, unreadable_html

REPORT = "opened"
"""Id of the place in the page where the report is."""
SHOW_REPORT = f"() => {{ document.getElementById('{REPORT}')?.scrollIntoView({{ block: 'start' }}); }}"
FILE_TYPES = [".yaml", ".yml", ".json"]


def opened(text: str, what: str) -> list[Any]:
    """The draft of a file, the report of what was found in it, and what each control shows.

    Args:
        text: YAML or JSON.
        what: What the file is called.

    Returns:
        Updates for the draft, the report, and the controls in the order of `FIELDS`; of a file that cannot be read
        only the report.
    """
    try:
        document = parse_file(text)
        draft = open_draft(text)
        shown = import_html(document, what, was_json=is_json(text) and document.dump() != text)
    except QuantdeckError as error:
        return unopened(unreadable_html(error, what))
    return [draft, gr.HTML(shown, visible=True), *draft.shown]


def unopened(html: str = "") -> list[Any]:
    """As `opened`, with the form as it is and at most something said."""
    said = gr.HTML(html, visible=True) if html else gr.skip()
    return [gr.skip(), said, *(gr.skip() for _ in FIELDS)]


def only_changes(updates: list[Any], present: Sequence[Any]) -> list[Any]:
    """What `opened` returns, without the values that the controls show already: drawing all of them takes seconds.

    Args:
        updates: As `opened` returns them.
        present: What the controls show, in the order of `FIELDS`.
    """
    said, shown = updates[: -len(FIELDS)], updates[-len(FIELDS) :]
    return said + [gr.skip() if same(new, old) else new for new, old in zip(shown, present, strict=True)]


def same(new: Any, old: Any) -> bool:
    """Whether a control that shows `old` would not change by showing `new`."""
    return type(new) is type(old) and bool(new == old)


class Importer:
    """The folded part with the file and the text; laid out where it is made."""

    def __init__(self) -> None:
        with gr.Accordion("Open a YAML file", open=False, elem_id="import"):
            self._upload = gr.File(
                label="Job file: YAML or JSON", file_types=FILE_TYPES, height=110, elem_id="yaml-file"
            )
            self._pasted = gr.Textbox(label="or paste it here", lines=6, max_lines=14, elem_id="yaml-paste")
            self._fill = gr.Button("Fill the form from this text", elem_id="yaml-fill")

    def connect(self, controls: Sequence[Component], opening: Mapping[str, Any]) -> list[Dependency]:
        """Let both fill the form.

        Args:
            controls: In the order of `FIELDS`.
            opening: Arguments of their listeners; `outputs` are those of `opened`.

        Returns:
            The listeners.
        """

        def on_upload(path: str | None, *present: Any) -> list[Any]:
            if path is None:
                return unopened()
            file = Path(path)
            try:
                text = decode_yaml(_read(file), file.name)
            except QuantdeckError as error:
                return unopened(unreadable_html(error, file.name))
            return only_changes(opened(text, file.name), present)

        def on_paste(text: str, *present: Any) -> list[Any]:
            return only_changes(opened(text or "", "The pasted file"), present)

        made = [
            self._upload.upload(on_upload, [self._upload, *controls], **opening),
            self._fill.click(on_paste, [self._pasted, *controls], **opening),
        ]
        for event in made:
            event.then(None, None, None, js=SHOW_REPORT, api_visibility="private")
        return made


def _read(file: Path) -> bytes:
    with open(file, "rb") as opened_file:
        raw = opened_file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"it has more than {MAX_BYTES} bytes; a job file has at most that")
    return raw
