"""A draft's settings as files of other programs: what each gets, what it loses, or why it cannot have them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import quote

from backend.errors import QuantdeckError
from backend.jobs.export_notes import Exported, exported
from ui.layout import esc

PROGRAMS = {
    "nyuntam": ("Nyuntam", "{}.nyuntam.yaml", "Job file"),
    "llmcompressor": ("llm-compressor", "{}.recipe.yaml", "Recipe"),
}
"""Target -> name of the program, of the file, and what the file is."""
MOST_NAMED = 6  # keys


@lru_cache(maxsize=64)
def exports_html(text: str, name: str) -> str:
    """The files for other programs, to be downloaded.

    Args:
        text: The job file.
        name: Its name without ending.
    """
    rows = "".join(_row(text, name, target) for target in PROGRAMS)
    return f'<section class="qd-card qd-exports"><h2>For other programs</h2><ul>{rows}</ul></section>'


def _row(text: str, name: str, target: str) -> str:
    program, file, what = PROGRAMS[target]
    try:
        found = exported(text, target)
    except QuantdeckError as error:
        return f'<li data-target="{target}"><div><b>{program}</b></div><p>Not possible: {esc(error.message)}</p></li>'
    address = f"data:application/yaml;charset=utf-8,{quote(found.text, errors='replace')}"
    link = (
        f'<a class="qd-button qd-secondary" download="{esc(file.format(name))}" href="{esc(address)}" '
        f'aria-label="{what} for {program}">{what}</a>'
    )
    told = "".join(f"<p>{esc(sentence)}</p>" for sentence in sentences(found))
    return f'<li data-target="{target}"><div><b>{program}</b>{link}</div>{told}</li>'


def sentences(found: Exported) -> list[str]:
    """What is lost, changed, and to be known."""
    told = []
    if found.left_out:
        told.append(f"Left out, since it has no such keys: {_named(found.left_out)}.")
    if found.changed:
        told.append(f"Set for it: {_named([f'{key}: {value}' for key, value in found.changed])}.")
    if not told and not found.notes:
        told.append("The same settings: none of them is ours.")
    return [*told, *found.notes]


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
