"""The frame that every page shares: header with navigation, titles, cards, notices, empty states.

Everything here returns HTML as text. Whatever did not come from this package is passed through `esc`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import gradio as gr

PAGES = (
    ("jobs", "Jobs", "/"),
    ("new", "New job", "/new"),
    ("compare", "Compare", "/compare"),
    ("chat", "Chat", "/chat"),
    ("engines", "Engines", "/engines"),
)

_MARK = (
    '<svg viewBox="0 0 24 24" width="22" height="22" aria-hidden="true">'
    '<rect x="2" y="3" width="5" height="18" rx="1.5" fill="currentColor" opacity=".35"/>'
    '<rect x="9.5" y="8" width="5" height="13" rx="1.5" fill="currentColor" opacity=".65"/>'
    '<rect x="17" y="14" width="5" height="7" rx="1.5" fill="currentColor"/></svg>'
)
_HALF_MOON = (
    '<svg viewBox="0 0 24 24" width="18" height="18" aria-hidden="true" fill="none" stroke="currentColor" '
    'stroke-width="1.8"><circle cx="12" cy="12" r="8.2"/><path d="M12 3.8a8.2 8.2 0 0 1 0 16.4z" '
    'fill="currentColor"/></svg>'
)

# What changes how a terminal or a browser shows the text around it: control characters (an escape code begins with
# one) and marks that turn the reading direction; and half characters, which no answer can carry.
_MARKS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CODE = re.compile(r"`([^`\n]+)`")

# Clicks on [data-act] buttons inside our HTML become Gradio click events that carry the button's data.
ACTION_JS = """
element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-act]');
  if (!button || button.disabled) return;
  event.preventDefault();
  if (button.dataset.confirm && !window.confirm(button.dataset.confirm)) return;
  button.disabled = true;
  const { act, uid = '', uids = '' } = button.dataset;
  trigger('click', { act, uid, uids });
});
"""

# The address tells what is shown, so that a reload or a bookmark shows the same.
ADDRESS_JS = """
watch('value', () => {
  const shown = element.querySelector('[data-address]');
  if (!shown) return;
  const address = new URL(shown.dataset.address, location.origin);
  const theme = new URLSearchParams(location.search).get('__theme');
  if (theme) address.searchParams.set('__theme', theme);
  if (address.href !== location.href) history.replaceState(history.state, '', address);
});
"""


# What somebody has folded open or shut stays so when the HTML around it is replaced.
KEEP_OPEN_JS = """
const chosen = new Map();
element.addEventListener('toggle', (event) => {
  if (event.target.dataset.key) chosen.set(event.target.dataset.key, event.target.open);
}, true);
watch('value', () => {
  for (const one of element.querySelectorAll('details[data-key]')) {
    if (chosen.has(one.dataset.key)) one.open = chosen.get(one.dataset.key);
  }
});
"""


def plain(value: object) -> str:
    """`value` as text in which control characters and marks of reading direction are written out and do nothing.

    For text that is shown as it is (choices of a list, lines of a log); inside HTML it is `esc`.
    """
    return _MARKS.sub(_written_out, str(value))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found[0])
    if 0xD800 <= code <= 0xDFFF:
        return "\N{REPLACEMENT CHARACTER}"
    if code < 0x20:
        return chr(0x2400 + code)  # the picture of that control character
    return "\N{SYMBOL FOR DELETE}" if code == 0x7F else f"<U+{code:04X}>"


def esc(value: object) -> str:
    """`value` as text that is safe inside HTML content and quoted attributes, and turns no text around it."""
    return html.escape(plain(value), quote=True)


def prose(value: object) -> str:
    """`value` as safe HTML in which what stands between two backticks looks like code."""
    return _CODE.sub(r"<code>\1</code>", esc(value))


@contextmanager
def page(active: str) -> Iterator[None]:
    """Opens a page: our header on top instead of Gradio's own navigation bar.

    Args:
        active: Key of the page in `PAGES` that the header marks; empty for none.
    """
    gr.Navbar(visible=False)
    gr.HTML(header(active), elem_classes=["qd-header-block"])
    with gr.Column(elem_classes=["qd-page"]):
        yield


def header(active: str) -> str:
    """The top bar: brand, navigation and the switch between light and dark."""
    links = "".join(
        f'<a href="{path}"{" aria-current=page" if key == active else ""}>{label}</a>' for key, label, path in PAGES
    )
    return (
        f'<header class="qd-header"><a class="qd-brand" href="/">{_MARK}<span>Quantdeck</span></a>'
        f'<nav aria-label="Pages">{links}</nav>'
        f'<button type="button" class="qd-icon" data-theme-toggle title="Switch between light and dark" '
        f'aria-label="Switch between light and dark">{_HALF_MOON}</button></header>'
    )


def title(text: str, lead: str = "", right: str = "") -> str:
    """A page's heading with one sentence below it; `lead` and `right` are HTML."""
    below = f'<p class="qd-lead">{lead}</p>' if lead else ""
    side = f'<div class="qd-actions">{right}</div>' if right else ""
    return f'<div class="qd-title"><div><h1>{esc(text)}</h1>{below}</div>{side}</div>'


def card(body: str, heading: str = "", *, classes: str = "") -> str:
    """A bordered box; `body` is HTML, `heading` plain text."""
    head = f"<h2>{esc(heading)}</h2>" if heading else ""
    return f'<section class="qd-card {classes}">{head}{body}</section>'


REMOTE_CODE = (
    "This job may run code that comes with its model",
    "Such code has all rights of the user that runs Quantdeck: it can read and change that user's files. The operator "
    "has allowed such jobs here.",
)
"""Heading and text of the notice at every job with TRUST_REMOTE_CODE."""


def notice(kind: str, heading: str, text: str = "", buttons: str = "") -> str:
    """A message box of kind `info`, `warn`, `error` or `good`; `heading` and `text` are plain text, `buttons` HTML."""
    body = f"<p>{prose(text)}</p>" if text else ""
    body += f'<div class="qd-actions">{buttons}</div>' if buttons else ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="qd-notice qd-{kind}" role="{role}"><strong>{esc(heading)}</strong>{body}</div>'


def empty(heading: str, text: str, buttons: str = "") -> str:
    """What a page shows while it has nothing to show: what will be here, and the way there."""
    return (
        f'<div class="qd-empty">{_MARK}<h2>{esc(heading)}</h2><p>{esc(text)}</p>'
        f'<div class="qd-actions">{buttons}</div></div>'
    )


def link(text: str, href: str, kind: str = "secondary", **attributes: str) -> str:
    """A link that looks like a button of kind `primary` or `secondary`."""
    extra = "".join(f' {name.replace("_", "-")}="{esc(value)}"' for name, value in attributes.items())
    return f'<a class="qd-button qd-{kind}" href="{esc(href)}"{extra}>{esc(text)}</a>'


def action(
    text: str,
    act: str,
    uid: str,
    *,
    kind: str = "secondary",
    confirm: str = "",
    title: str = "",
    uids: Sequence[str] = (),
) -> str:
    """A button whose click reaches the page's Python handler through `ACTION_JS`; `uids` of one for several jobs."""
    extra = f' data-confirm="{esc(confirm)}"' if confirm else ""
    extra += f' data-uids="{esc(" ".join(uids))}"' if uids else ""
    extra += f' title="{esc(title)}"' if title else ""
    return (
        f'<button type="button" class="qd-button qd-{kind}" data-act="{esc(act)}" data-uid="{esc(uid)}"{extra}>'
        f"{esc(text)}</button>"
    )


def facts(rows: list[tuple[str, str]]) -> str:
    """A list of names and values (both plain text)."""
    return (
        '<dl class="qd-facts">' + "".join(f"<div><dt>{esc(k)}</dt><dd>{esc(v)}</dd></div>" for k, v in rows) + "</dl>"
    )
