"""How to load a quantized model, on the job's page: each program's command with a button that copies it."""

from __future__ import annotations

from collections.abc import Sequence

from ui.layout import esc, prose
from ui.loadways import Way


def load_html(found: Sequence[Way], name: str = "") -> str:
    """The ways, each folded, the first one open; `name` tells those of several models apart."""
    return "".join(_way(way, f"{name} {way.program}", is_open=i == 0) for i, way in enumerate(found))


def _way(way: Way, key: str, *, is_open: bool) -> str:
    mark = "" if way.command else ' <span class="qd-muted qd-plain">cannot load it</span>'
    remark = prose(way.remark)
    code = (
        f'<div class="qd-copied"><pre class="qd-log" tabindex="0">{esc(way.command)}</pre>'
        f"{copy_button('', f'Copy the command for {way.program}')}</div>"
        if way.command
        else ""
    )
    return (
        f'<details data-key="{esc(key)}"{" open" if is_open else ""}><summary>{esc(way.program)}{mark}'
        f'</summary><section><p class="qd-muted qd-small">{remark}</p>{code}</section></details>'
    )


def copy_button(text: str, told: str, label: str = "Copy") -> str:
    """A button that copies `text`, or what the section around it shows as code.

    Args:
        text: What is copied; empty for the code of the section.
        told: What the button does, for screen readers and pointers.
        label: On the button.
    """
    return (
        f'<button type="button" class="qd-button qd-secondary qd-copy" data-copy="{esc(text)}" title="{esc(told)}" '
        f'aria-label="{esc(told)}">{esc(label)}</button>'
    )
