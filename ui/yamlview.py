"""A job file as text on a page: keys and comments set apart, with copy and download."""

from __future__ import annotations

import re
from urllib.parse import quote

from ui.layout import esc

_KEY = re.compile(r"^(\s*(?:- )?)([^\s:#\"'\[{][^:#]*)(:)(?=\s|$)(.*)$")


def yaml_html(text: str, name: str, heading: str) -> str:
    """The file in a box.

    Args:
        text: The YAML.
        name: File name offered for the download.
        heading: Line above it.
    """
    lines = "\n".join(_line(line) for line in text.splitlines())
    address = f"data:application/yaml;charset=utf-8,{quote(text, errors='replace')}"
    return (
        f'<section class="qd-card qd-flush qd-yaml"><div class="qd-yaml-head"><strong>{esc(heading)}</strong>'
        '<span class="qd-row-actions"><button type="button" class="qd-button qd-secondary" data-copy>Copy</button>'
        f'<a class="qd-button qd-secondary" download="{esc(name)}" href="{esc(address)}">Download</a></span></div>'
        f'<pre class="qd-log" tabindex="0">{lines}</pre></section>'
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
