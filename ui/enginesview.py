"""What the engines page shows, as HTML."""

from __future__ import annotations

from itertools import groupby

from backend.engines.environments import Environment
from backend.engines.installing import Installation
from backend.engines.status import EngineStatus, Machine, main_packages
from ui.format import size
from ui.layout import action, card, esc, notice, prose

_BADGES = {
    "absent": ("queued", "Not installed"),
    "running": ("running", "Installing"),
    "failed": ("failed", "Failed"),
    "installed": ("succeeded", "Installed"),
}
_KINDS = {"engine": "Engine", "peer": "For benchmarks only"}


def badge(state: str, words: str) -> str:
    """A coloured word, in the colours of the jobs' states."""
    return f'<span class="qd-badge qd-s-{esc(state)}">{esc(words)}</span>'


def engines_table(rows: list[EngineStatus]) -> str:
    """Every algorithm with its engines: enabled, or why not."""
    head = "<tr><th>Algorithm</th><th>Engine</th><th>Here</th><th>What it is</th></tr>"
    body = ""
    for algorithm, group in groupby(rows, key=lambda row: row.algorithm):
        members = list(group)
        for number, row in enumerate(members):
            first = f'<td rowspan="{len(members)}"><strong>{esc(algorithm)}</strong></td>' if number == 0 else ""
            here = badge("succeeded", "Enabled") if row.reason is None else badge("queued", "Not available")
            why = "" if row.reason is None else f'<p class="qd-small">{prose(row.reason)}</p>'
            versions = ", ".join(row.packages) or f"environment {row.engine.environment}"
            body += (
                f"<tr>{first}<td><strong>{esc(row.engine.name)}</strong></td><td>{here}{why}</td>"
                f'<td>{esc(row.engine.about)}<p class="qd-small qd-muted">{esc(versions)}</p></td></tr>'
            )
    return _table(head, body)


def _table(head: str, body: str) -> str:
    """A table in a box of its own; on a narrow screen each row is a block."""
    return card(
        f'<table class="qd-table qd-flow"><thead>{head}</thead><tbody>{body}</tbody></table>', classes="qd-flush"
    )


def environment_card(env: Environment, found: Installation, n_bytes: int | None = None, turn: int = 0) -> str:
    """One environment: what it is for, how far it is, and the button that installs it.

    Args:
        env: The environment.
        found: How far it is.
        n_bytes: What it takes on disk, if that is known.
        turn: Number of clicks answered; a new number draws the button anew.
    """
    state, words = _BADGES[found.state]
    button = ""
    if found.state in ("absent", "failed"):
        again = "Install" if found.state == "absent" else "Try again"
        button = action(again, "install", env.name, kind="primary")
    facts = [_KINDS.get(str(env.about.get("kind")), ""), f"Python {env.about['python']}", *main_packages(env)]
    facts += [f"{size(n_bytes)} on disk"] if n_bytes else []
    failed = notice("error", "The installation failed", found.reason) if found.state == "failed" else ""
    return card(
        f'<div class="qd-title" data-turn="{turn}"><div><h2>{esc(env.name)} {badge(state, words)}</h2>'
        f'<p class="qd-lead">{esc(env.about["about"])}</p>'
        f'<p class="qd-small qd-muted">{esc(" · ".join(fact for fact in facts if fact))}</p></div>'
        f'<div class="qd-actions">{button}</div></div>{failed}'
    )


def log_html(found: Installation) -> str:
    """The end of an installation's log; nothing for one that is finished or was never begun."""
    if found.state not in ("running", "failed") or not found.lines:
        return ""
    return (
        f'<pre class="qd-log" tabindex="0" aria-label="Log of the installation">{esc(chr(10).join(found.lines))}</pre>'
    )


def machine_html(found: Machine, packages: list[str]) -> str:
    """GPUs, driver, where TensorRT-LLM could run, and the versions of Quantdeck's own packages."""
    gpus = [esc(line) for line in found.gpus] or ["No NVIDIA GPU that a driver answers for: jobs run on the CPU."]
    driver = f"NVIDIA driver {esc(found.driver)}" if found.driver else "No NVIDIA driver"
    places = ""
    for place in found.places:
        here = badge("succeeded", "Ready") if not place.reasons else badge("queued", "Not available")
        told = "<br>".join(prose(reason) for reason in place.reasons) or esc(place.found)
        places += f"<tr><td><strong>{esc(place.name)}</strong></td><td>{here}</td><td>{told}</td></tr>"
    head = "<tr><th>TensorRT-LLM in</th><th>Here</th><th>What was found</th></tr>"
    own = card(f"<p>{esc(', '.join(packages))}</p>", "Packages of Quantdeck's own environment")
    gpu = card(f"<p>{driver}</p><p>{'<br>'.join(gpus)}</p>", "GPU")
    return f'<div style="display:grid;gap:16px;min-width:0">{gpu}{_table(head, places)}{own}</div>'
