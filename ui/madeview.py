"""What a job made and how it went: the folders with their files, what stayed in 16 bits, what was recovered."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backend.jobs.publish import read_manifest
from ui.format import size
from ui.layout import card, esc, link
from ui.loadview import copy_button, load_html
from ui.loadways import GUIDES_TASK, Task, ways

Entry = Mapping[str, Any]
MAX_NAMES = 6
SHA256 = re.compile(r"[0-9a-f]{64}")
SHOWN = 12  # characters of a checksum


def made(uid: str, entries: Sequence[Entry], tasks: Sequence[Task] = GUIDES_TASK) -> str:
    """Where the quantized models are, their files, and how to load them.

    Args:
        uid: The job.
        entries: Its saved configurations.
        tasks: What lm_eval measures of them.
    """
    single = len(entries) == 1
    parts = []
    for entry in entries:
        body = _artefact(uid, entry, tasks)
        parts.append(body if single else _folded(f"{entry['label'] or entry['name']}", body))
    return card("".join(parts), "Quantized model" if single else "Quantized models") if parts else ""


def _folded(heading: str, body: str) -> str:
    return f'<details data-key="{esc(heading)}"><summary>{esc(heading)}</summary>{body}</details>'


def _artefact(uid: str, entry: Entry, tasks: Sequence[Task]) -> str:
    folder = Path(str(entry["artefact"]))
    name = quote(str(entry["name"] or ""), safe="", errors="replace")
    chat = link("Chat with it", f"/chat?job={uid}&configuration={name}") if name else ""
    copied = copy_button(str(folder), "Copy the path of the folder")
    where = f'<p class="qd-mono qd-small qd-path">{esc(folder)}</p>'
    above = f'<div class="qd-row-between">{where}<div class="qd-actions">{copied}{chat}</div></div>'
    files = files_of(folder)
    if not files:
        return f'{above}<p class="qd-muted">The folder was removed, or cannot be read.</p>'
    loaded = load_html(ways(folder, _stated(folder), tasks), str(entry["name"] or ""))
    return f'{above}{_files(uid, entry, files)}<h2 class="qd-later">Load it</h2><div class="qd-load">{loaded}</div>'


def _files(uid: str, entry: Entry, files: Sequence[tuple[str, int]]) -> str:
    sums = checksums(entry)
    listed = "".join(
        f'<tr><td class="qd-mono"><a href="{esc(download_path(uid, entry, name))}" download>{esc(name)}</a></td>'
        f'<td class="qd-num">{size(n_bytes)}</td><td class="qd-mono qd-sum">{_sum(name, sums.get(name))}</td></tr>'
        for name, n_bytes in files
    )
    table = (
        '<table class="qd-table qd-files"><thead><tr><th>File</th><th class="qd-num">Size</th>'
        f"<th>SHA-256</th></tr></thead><tbody>{listed}</tbody></table>"
    )
    if not sums:
        return table
    told = "Copy all checksums as a list for sha256sum -c"
    hint = "All checksums as a list: paste it into a file beside the model, and <code>sha256sum -c</code> checks them."
    return (
        f'{table}<div class="qd-row-between qd-small qd-sums"><span>{hint}</span>'
        f"{copy_button(sums_list(sums), told, 'Copy all checksums')}</div>"
    )


def sums_list(sums: Mapping[str, str]) -> str:
    """Checksums as `sha256sum` writes and reads them; names with line breaks are left out."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()) if not set(name) & set("\n\r\\"))


def download_path(uid: str, entry: Entry, file: str) -> str:
    """Address of one file of a configuration."""
    parts = (quote(str(part), safe="", errors="replace") for part in (uid, entry["name"] or "model", file))
    return f"/download/{'/'.join(parts)}"


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Name and bytes of every file of an artefact, and of those that it has in folders; empty if it was removed."""
    try:
        names = {path.name for path in folder.iterdir()}
        names |= {name for name in (read_manifest(folder) or {}).get("files") or () if "/" in name}
        return sorted((name, (folder / name).stat().st_size) for name in names if (folder / name).is_file())
    except (OSError, ValueError, TypeError):
        return []


def checksums(entry: Entry) -> dict[str, str]:
    """The SHA-256 of each file as it was published, by its name; what was stored wrongly is left out."""
    files = (entry.get("manifest") or {}).get("files") or {}
    found = {name: str((facts or {}).get("sha256") or "") for name, facts in files.items()}
    return {name: digest for name, digest in found.items() if SHA256.fullmatch(digest)}


def _sum(file: str, digest: str | None) -> str:
    """The beginning of a checksum, the whole of it where the pointer rests, and a button that copies it."""
    if not digest:
        return ""
    return f'<span title="{digest}">{digest[:SHOWN]}…</span> {copy_button(digest, f"Copy the SHA-256 of {file}")}'


def _stated(folder: Path) -> dict[str, Any]:
    """How config.json says that the checkpoint is quantized; empty if it says nothing, or is gone."""
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        return stated if isinstance(stated, dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def notes(entries: Sequence[Entry]) -> str:
    """What is worth knowing of each configuration: Linears that stayed in 16 bits, and what was recovered on the way.

    Returns:
        A card, or nothing if there is nothing to tell.
    """
    told = [[*_general(entry), *_kept(entry), *_layer_notes(entry)] for entry in entries]
    shared = [line for line in told[0] if all(line in lines for lines in told[1:])] if told else []
    parts = [_list("All configurations" if len(entries) > 1 else "", shared)]
    for entry, lines in zip(entries, told, strict=True):
        parts.append(_list(str(entry["label"] or entry["name"]), [line for line in lines if line not in shared]))
    body = "".join(parts)
    return card(f'<div class="qd-notes">{body}</div>', "Notes") if body else ""


def _list(heading: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    named = f"<h3>{esc(heading)}</h3>" if heading else ""
    return f"{named}<ul>{''.join(f'<li>{line}</li>' for line in lines)}</ul>"


def _general(entry: Entry) -> list[str]:
    """What the engine says of the whole; notes on single layers are told by `_layer_notes`."""
    layers = entry.get("layers") or []
    told = {f"{layer['layer']}: {note}" for layer in layers for note in layer.get("notes") or []}
    lines = [esc(note) for note in entry.get("notes") or [] if note not in told]
    path = entry.get("decode_path")
    return [*lines, f"Measured with: {esc(path)}"] if path else lines


def _kept(entry: Entry) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, reason in (entry.get("skipped") or {}).items():
        by_reason.setdefault(str(reason), []).append(str(name))
    return [f"Kept in 16 bits, since {esc(reason)}: {_names(names)}" for reason, names in by_reason.items()]


def _layer_notes(entry: Entry) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for layer in entry.get("layers") or []:
        for note in layer.get("notes") or []:
            by_note.setdefault(str(note), []).append(str(layer["layer"]))
    return [f"{esc(note)} ({_names(layers)})" for note, layers in by_note.items()]


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(f"<code>{esc(name)}</code>" for name in names[:MAX_NAMES])
    more = len(names) - MAX_NAMES
    return f"{shown} and {more} more" if more > 0 else shown
