"""A job file as text on a page: keys and comments set apart, with copy and download."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from ui.differences import Difference
from ui.layout import esc

MOST_NAMED = 12  # settings that the legend names

_KEY = re.compile(r"^(\s*(?:- )?)([^\s:#\"'\[{][^:#]*)(:)(?=\s|$)(.*)$")


def yaml_html(text: str, name: str, heading: str, differing: Sequence[Difference] = ()) -> str:
    """The file in a box.

    Args:
        text: The YAML.
        name: File name offered for the download.
        heading: Line above it.
        differing: Settings whose lines are marked, and named below.
    """
    usual = {one.line: one.default for one in differing}
    lines = "\n".join(_marked(line, usual.get(number)) for number, line in enumerate(text.split("\n")))
    address = f"data:application/yaml;charset=utf-8,{quote(text, errors='replace')}"
    return (
        f'<section class="qd-card qd-flush qd-yaml"><div class="qd-yaml-head"><strong>{esc(heading)}</strong>'
        '<span class="qd-row-actions"><button type="button" class="qd-button qd-secondary" data-copy>Copy</button>'
        f'<a class="qd-button qd-secondary" download="{esc(name)}" href="{esc(address)}">Download</a></span></div>'
        f'<pre class="qd-log" tabindex="0">{lines.rstrip()}</pre>{_legend(differing)}</section>'
    )


def _marked(line: str, default: str | None) -> str:
    """A line; with a mark that tells the default if its setting differs from it."""
    if default is None:
        return _line(line)
    return f'<mark class="qd-differs" title="default: {esc(default)}">{_line(line)}</mark>'


def _legend(differing: Sequence[Difference]) -> str:
    """What the marks mean, and the settings in words for those who do not see them."""
    if not differing:
        return ""
    many = "1 setting differs" if len(differing) == 1 else f"{len(differing)} settings differ"
    named = ", ".join(f"{one.key} (default: {one.default})" for one in differing[:MOST_NAMED])
    more = f" and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
    return (
        '<details class="qd-legend"><summary><span class="qd-swatch" aria-hidden="true"></span>'
        f"{many} from the defaults</summary><p>{esc(named + more)}</p></details>"
    )


def _line(line: str) -> str:
    start = _comment_start(line)
    code, comment = line[:start], line[start:]
    if found := _KEY.match(code):
        indent, key, colon, rest = found.groups()
        code_html = f"{esc(indent)}<b>{esc(key)}</b>{colon}{esc(rest)}"
    else:
        code_html = esc(code)
    return code_html + (f"<i>{esc(comment)}</i>" if comment else "")


def _comment_start(line: str) -> int:
    """Where the comment begins: a `#` after a space or at the start, outside of quotes; else the line's end."""
    quoted = ""
    for i, char in enumerate(line):
        if char in "\"'" and quoted in ("", char):
            quoted = "" if quoted else char
        elif char == "#" and not quoted and (i == 0 or line[i - 1].isspace()):
            return i
    return len(line)
