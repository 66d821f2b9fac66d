"""The lists of models on the page New job: what a search of the Hub finds, and what is in the caches here."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from backend.errors import ConfigError, QuantdeckError
from backend.paths import Home
from backend.sources import hub, hub_cache
from backend.sources.hub_errors import HubUnreachable
from ui.format import count, size
from ui.layout import action, esc, notice

CACHED_SHOWN = 50


def found_html(home: Home, text: str, cache: str = "") -> str:
    """The models on the Hub that a search finds; without a text, or without the Hub, those in the cache."""
    if not text:
        return _cached_table(home, cache)
    try:
        found = hub.search(home, text)
    except HubUnreachable as error:
        return notice("warn", "The Hub cannot be searched", error.message) + _cached_table(home, cache)
    except ConfigError as error:
        return notice("info", "Nothing to search for yet", error.detail)
    except QuantdeckError as error:
        return notice("warn", "The Hub cannot be searched", error.message)
    if not found:
        return notice("info", f"No text-generation model on the Hub has {text!r} in its name", "Try fewer words.")
    return _list([_hub_row(model) for model in found])


def _hub_row(model: hub.HubModel) -> str:
    counted = ((model.parameters, "parameters"), (model.downloads, "downloads"), (model.likes, "likes"))
    below = [model.architecture, *(f"{count(n)} {what}" for n, what in counted if n is not None), model.licence]
    below += [f"changed {model.updated}"] if model.updated else []
    return _row(model.id, below, gated=model.gated, refused=_short(model.refused) if model.refused else "")


def _short(reason: str) -> str:
    """A refusal in a table: its first sentence."""
    return f"cannot be quantized: {reason.partition(': ')[2] or reason}".partition(". ")[0].partition(";")[0]


def _cached_table(home: Home, cache: str = "") -> str:
    """What is in the caches of this machine, whether a job can use it, and why not."""
    found = hub_cache.inventory(home, cache)
    if not found.models and not found.damaged:
        return notice("info", "No Hub model is in the cache here", "Models stay there after their first job.")
    rows = []
    for model in found.models[:CACHED_SHOWN]:
        which = f"commit {model.commit[:12]}" + (", the newest when downloaded" if model.is_main else "")
        place = "in the jobs' cache" if model.ours else "in this user's Hub cache"
        used = f"last used {datetime.fromtimestamp(model.used).date().isoformat()}" if model.used else ""
        value = model.id if model.is_main else f"{model.id}@{model.commit}"
        refused = "" if model.refused is None else _of_cached(model)
        rows.append(_row(model.id, [size(model.bytes), which, used, place], value=value, refused=refused))
    lead = '<p class="qd-muted qd-small">In the cache: these need no network.</p>'
    more = len(found.models) - CACHED_SHOWN
    below = [f"{more} more are in the cache."] if more > 0 else []
    if found.damaged:
        below.append(f"Damaged, and downloaded anew by the next job: {', '.join(found.damaged)}.")
    return (lead + _list(rows) if rows else "") + "".join(f'<p class="qd-muted qd-small">{esc(b)}</p>' for b in below)


def _of_cached(model: hub_cache.CachedModel) -> str:
    """Why a copy cannot be used as it is, in one line."""
    if not model.whole:
        return "not whole: files are missing; a job downloads what is missing"
    reason = (model.refused or "").partition("; ")[0].partition(". ")[0]
    return reason if reason.startswith(hub_cache.NOT_WHOLE) else f"cannot be quantized: {reason}"


def _row(name: str, below: Sequence[str | None], *, value: str = "", gated: bool = False, refused: str = "") -> str:
    """A model of a list: its name, what is known of it, and the button that takes it; all plain text."""
    badge = ' <span class="qd-hub-gated">gated</span>' if gated else ""
    no = f'<span class="qd-sub qd-hub-no">{esc(refused)}</span>' if refused else ""
    told = " · ".join(esc(part) for part in below if part)
    use = action("Use", "use", value or name, title=f"Take {name} for this job")
    return f'<li><div><b>{esc(name)}</b>{badge}<span class="qd-sub">{told}</span>{no}</div>{use}</li>'


def _list(rows: list[str]) -> str:
    return f'<ul class="qd-hub-list">{"".join(rows)}</ul>'
