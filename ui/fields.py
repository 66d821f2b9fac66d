"""Builds the form's controls from the schema: one control per setting, with its help, unit and bounds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import gradio as gr
from gradio.components import Component

from backend.schema.facts import OWN
from ui.draft import FIELDS, UNSET, FormField

ROW = 2  # controls side by side
MOST_BUTTONS = 5  # choices shown side by side; more are a list to open


def elem_id(field: FormField) -> str:
    """The control's id in the page, e.g. `f-llm-AutoAWQ-W_BIT`."""
    return "f-" + "-".join(field.path)


def help_text(field: FormField) -> str:
    """The setting's help with its bounds, and where it comes from unless it is our own, as Markdown."""
    spec = field.spec
    bounds = ""
    if spec.ge is not None and spec.le is not None and spec.le < 2**31:
        bounds = f" {spec.ge:g} to {f'{spec.le:,.0f}' if spec.le > 1 else f'{spec.le:g}'}."
    elif spec.ge is not None and spec.ge > 0:
        bounds = f" At least {spec.ge:g}."
    return plain_info(spec.help + bounds) + ("" if spec.source == OWN else f" *{spec.source}*")


def plain_info(text: str) -> str:
    """A text as the line below a label that shows exactly it.

    Gradio reads `**`, `__`, `*`, `_`, backticks and `[](…)` in that line as marks and knows no way to escape them, so
    the characters of such pairs become ones that look the same.
    """
    if text.count("`") > 1:
        text = text.replace("`", "\N{MODIFIER LETTER GRAVE ACCENT}")
    if text.count("*") > 1:
        text = text.replace("*", "\N{ASTERISK OPERATOR}")
    if re.search(r"__.+?__|(?<!\w)_.+?_(?!\w)", text):
        text = re.sub(r"(?<!\w)_+|_+(?!\w)|__+", lambda found: "\N{MODIFIER LETTER LOW MACRON}" * len(found[0]), text)
    return text.replace("](", "]\N{ZERO WIDTH SPACE}(")


def classes(field: FormField) -> list[str]:
    """The control's classes in the page."""
    return ["qd-number"] if field.spec.type in ("int", "float") else []


def control(field: FormField, value: Any, suggestions: Sequence[tuple[str, str]] = ()) -> Component:
    """The control of one setting.

    Bounds are told but not enforced here: the schema checks them, so the message is the same everywhere.

    Args:
        field: The setting.
        value: What it shows at first.
        suggestions: (label, value) pairs to pick from; anything else can be typed as well.
    """
    spec = field.spec
    told = not spec.unit or spec.label.lower().endswith(spec.unit)
    label = spec.label if told else f"{spec.label} ({spec.unit})"
    common: dict[str, Any] = {"label": label, "info": help_text(field), "elem_id": elem_id(field), "value": value}
    if suggestions:
        return gr.Dropdown(choices=list(suggestions), allow_custom_value=True, **common)
    if spec.type == "bool":
        return gr.Checkbox(**common)
    if spec.type in ("choice", "int_choice"):
        choices: list[tuple[str, Any]] = [("default", UNSET)] if spec.optional else []
        choices += [(str(choice), choice) for choice in spec.choices]
        if spec.several:
            return gr.Dropdown(choices=choices, multiselect=True, **common)
        kind = gr.Radio if len(choices) <= MOST_BUTTONS else gr.Dropdown
        return kind(choices=choices, **common)
    if spec.type in ("int", "float"):
        placeholder = "" if spec.default is not None or spec.required else spec.empty
        return gr.Textbox(max_lines=1, placeholder=placeholder, elem_classes=classes(field), **common)
    if spec.type == "list" and spec.choices:
        return gr.CheckboxGroup(choices=list(spec.choices), **common)
    return gr.Textbox(max_lines=1, **common)


def fields_of(section: str, *, advanced: bool | None = None, ignored: bool = False) -> list[FormField]:
    """The settings of a section, as for `Form.section`."""
    return [
        f
        for f in FIELDS
        if f.spec.section == section and f.spec.ignored is ignored and advanced in (None, f.spec.advanced)
    ]


class Form:
    """The controls of all settings, laid out section by section.

    Args:
        shown: First value of each control, in the order of `FIELDS`.
        suggestions: Per dotted key, (label, value) pairs to pick from.
    """

    def __init__(self, shown: Sequence[Any], suggestions: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        self._shown = dict(zip((f.key for f in FIELDS), shown, strict=True))
        self._suggestions = suggestions
        self.controls: dict[str, Any] = {}  # by dotted key
        self.folds: list[tuple[gr.Accordion, tuple[str, ...]]] = []  # each with the keys inside

    @contextmanager
    def fold(self, label: str) -> Iterator[None]:
        """A closed part with a heading, around the settings that are laid out within the block."""
        before = set(self.controls)
        with gr.Accordion(label, open=False) as made:
            yield
        self.folds.append((made, tuple(key for key in self.controls if key not in before)))

    def section(self, name: str, *, advanced: bool | None = None, ignored: bool = False) -> None:
        """Lay out the settings of a section; those already laid out are not repeated.

        Args:
            name: The section's name in the schema.
            advanced: Only the advanced (True) or only the simple (False) ones; None for all.
            ignored: Only those that no program reads (True), or only those that are read.
        """
        self.place(fields_of(name, advanced=advanced, ignored=ignored))

    def place(self, fields: Sequence[FormField]) -> None:
        """Lay out the given settings, two in a row."""
        fields = [f for f in fields if f.key not in self.controls]
        for start in range(0, len(fields), ROW):
            with gr.Row():
                for field in fields[start : start + ROW]:
                    self._add(field)

    def one(self, key: str) -> Component:
        """Lay out a single setting by its dotted key, over the whole width."""
        return self._add(next(f for f in FIELDS if f.key == key))

    def _add(self, field: FormField) -> Component:
        made = control(field, self._shown[field.key], self._suggestions.get(field.key, ()))
        self.controls[field.key] = made
        return made

    def ordered(self) -> list[Any]:
        """All controls in the order of `FIELDS`.

        Raises:
            KeyError: If a setting of the schema was not laid out.
        """
        return [self.controls[field.key] for field in FIELDS]
