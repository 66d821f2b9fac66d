"""Which settings of the form are shown: those that matter beside the others, and those that are wrong.

A hidden control keeps its value and sends it, so nothing of the file is lost. Parts that can be folded are hidden with
the last of their settings, and open when one of theirs turns out wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.events import Dependency

from backend.schema.facts import full_key, matters
from ui.draft import FIELDS, Draft, FormField, from_control
from ui.fields import Form

BY_KEY = {field.key: field for field in FIELDS}
CONDITIONAL = tuple(field for field in FIELDS if field.spec.visible_when)


def _asked(field: FormField, key: str) -> str:
    return full_key(field.path[:-1], key, BY_KEY)


CONTROLLING = tuple(
    BY_KEY[key]
    for key in dict.fromkeys(
        _asked(field, part.key) for field in CONDITIONAL for one in field.spec.visible_when for part in one
    )
)
"""The settings on which it depends whether others matter."""


def hidden_fields(values: Mapping[str, Any]) -> set[str]:
    """Dotted keys of the settings that change nothing.

    Args:
        values: Dotted key -> what the control shows, of `CONTROLLING` at least.
    """

    def value_of(key: str) -> Any:
        spec = BY_KEY[key].spec
        try:
            value = from_control(spec, values[key])
        except (TypeError, ValueError):  # nothing that a control of ours sends
            value = None
        return spec.default if value is None else value

    return {
        field.key
        for field in CONDITIONAL
        if not matters(field.spec.visible_when, lambda key, field=field: value_of(_asked(field, key)))  # type: ignore[misc]
    }


class Visibility:
    """Shows and hides the controls of a form.

    Args:
        form: The form, laid out.
        draft: What its controls show at first.
    """

    def __init__(self, form: Form, draft: Draft) -> None:
        self._controls = form.controls
        self._folds = form.folds
        hidden = sorted(hidden_fields({f.key: value for f, value in zip(FIELDS, draft.shown, strict=True)}))
        self._state = gr.State({"hidden": hidden, "wrong": []})
        for key in hidden:
            self._controls[key].visible = False
        for fold, keys in self._folds:
            fold.visible = not set(keys) <= set(hidden)

    def connect(self, wrong: gr.State, checked: Dependency) -> None:
        """Follow the controls, and what is wrong with them.

        Args:
            wrong: Dotted key -> message.
            checked: The listener that fills it.
        """
        controlling = [self._controls[field.key] for field in CONTROLLING]
        conditional = [self._controls[field.key] for field in CONDITIONAL]

        def on_visible(before: dict[str, list[str]], told: dict[str, str], *values: Any) -> list[Any]:
            return self.changes(before, told, values)

        told: dict[str, Any] = {
            "fn": on_visible,
            "inputs": [self._state, wrong, *controlling],
            "outputs": [self._state, *conditional, *(fold for fold, _ in self._folds)],
            "show_progress": "hidden",
            "queue": False,
            "api_visibility": "private",
        }
        gr.on([control.change for control in controlling], trigger_mode="always_last", **told)
        checked.then(**told)

    def changes(self, before: Mapping[str, Sequence[str]], told: Mapping[str, str], values: Sequence[Any]) -> list[Any]:
        """What has to change in the page.

        Args:
            before: What is hidden, and what was wrong, at present.
            told: Dotted key -> message of what is wrong now.
            values: What the controls of `CONTROLLING` show.

        Returns:
            The new state, then an update for each of `CONDITIONAL` and each fold.
        """
        was, known = set(before["hidden"]), set(before["wrong"])
        now = hidden_fields({f.key: value for f, value in zip(CONTROLLING, values, strict=True)}) - set(told)
        fields = [
            gr.update(visible=field.key not in now) if (field.key in now) != (field.key in was) else gr.skip()
            for field in CONDITIONAL
        ]
        folds = []
        for _, keys in self._folds:
            update: dict[str, Any] = {}
            if (shown := not set(keys) <= now) != (not set(keys) <= was):
                update["visible"] = shown
            if set(keys) & (set(told) - known):
                update["open"] = True
            folds.append(gr.update(**update) if update else gr.skip())
        state: Any = {"hidden": sorted(now), "wrong": sorted(told)}
        if state == {"hidden": list(before["hidden"]), "wrong": list(before["wrong"])}:
            state = gr.skip()
        return [state, *fields, *folds]
