"""What a job made and how it went: the folders with their files, what stayed in 16 bits, what was recovered."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from backend.engines.trtllm_handover import SCRIPT
from backend.jobs.publish import read_manifest
from ui.format import size
from ui.layout import card, esc, link

Entry = Mapping[str, Any]
VLLM_BITS = (4, 8)
MAX_NAMES = 6
SHA256 = re.compile(r"[0-9a-f]{64}")
SHOWN = 12  # characters of a checksum


def made(uid: str, entries: Sequence[Entry]) -> str:
    """Where the quantized models are, their files, and how to load them.

    Args:
        uid: The job.
        entries: Its saved configurations.
    """
    single = len(entries) == 1
    parts = []
    for entry in entries:
        body = _artefact(uid, entry)
        parts.append(body if single else _folded(f"{entry['label'] or entry['name']}", body))
    return card("".join(parts), "Quantized model" if single else "Quantized models") if parts else ""


def _folded(heading: str, body: str) -> str:
    return f"<details><summary>{esc(heading)}</summary>{body}</details>"


def _artefact(uid: str, entry: Entry) -> str:
    folder = Path(str(entry["artefact"]))
    sums = checksums(entry)
    listed = "".join(
        f'<tr><td class="qd-mono"><a href="{esc(download_path(uid, entry, name))}" download>{esc(name)}</a></td>'
        f'<td class="qd-num">{size(n_bytes)}</td><td class="qd-mono">{_short(sums.get(name))}</td></tr>'
        for name, n_bytes in files_of(folder)
    )
    code = (
        "from backend.formats.loader import load_model, load_tokenizer\n\n"
        f"model = load_model({str(folder)!r})\ntokenizer = load_tokenizer({str(folder)!r})"
    )
    name = quote(str(entry["name"] or ""), safe="", errors="replace")
    chat = link("Chat with it", f"/chat?job={uid}&configuration={name}") if name else ""
    return (
        f'<div class="qd-row-between"><p class="qd-mono qd-small">{esc(folder)}</p>{chat}</div>'
        '<div class="qd-scroll"><table class="qd-table"><thead><tr><th>File</th><th class="qd-num">Size</th>'
        "<th>SHA-256</th></tr>"
        f"</thead><tbody>{listed}</tbody></table></div>"
        f'<h2 style="margin-top:18px">Load it</h2><pre class="qd-log">{esc(code)}</pre>{_serving(folder)}'
    )


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


def _short(digest: str | None) -> str:
    """The beginning of a checksum, the whole of it where the pointer rests; a job's bundle has them all."""
    return f'<span title="{digest}">{digest[:SHOWN]}…</span>' if digest else ""


def _stated(folder: Path) -> dict[str, Any]:
    """How config.json says that the checkpoint is quantized; empty if it says nothing, or is gone."""
    try:
        stated = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        return stated if isinstance(stated, dict) else {}
    except (OSError, ValueError, AttributeError):
        return {}


def weight_bits(stated: Mapping[str, Any]) -> set[int]:
    """The bits of the quantized weights, as a checkpoint states them; empty if it states none."""
    try:
        groups = stated.get("config_groups") or {}
        found = [stated.get("bits"), *((group.get("weights") or {}).get("num_bits") for group in groups.values())]
        return {int(bits) for bits in found if bits}
    except (ValueError, TypeError, AttributeError):  # not as one of ours
        return set()


def _serving(folder: Path) -> str:
    stated = _stated(folder)
    bits = weight_bits(stated)
    if stated.get("quant_method") == "aqlm":
        text = (
            "Elsewhere: <code>AutoModelForCausalLM.from_pretrained</code> of transformers with the aqlm package "
            "(<code>pip install aqlm[gpu]</code> or <code>aqlm[cpu]</code>; on a CPU in float32 and with "
            "<code>NUMBA_NUM_THREADS=1</code>)."
        )
    elif stated.get("quant_method") == "modelopt":
        text = (
            f"With TensorRT-LLM and a GPU: <code>sh {esc(folder / SCRIPT)}</code> does the rest of the job, or "
            f"<code>{esc(f'trtllm-serve {folder}')}</code>. Not with transformers alone: it takes the codes for "
            "weights, without a word, and answers nonsense."
        )
    elif bits <= set(VLLM_BITS):
        text = f"On a machine with vLLM and a GPU: <code>{esc(f'vllm serve {folder}')}</code>"
    else:
        shown = " and ".join(str(b) for b in sorted(bits))
        text = f"vLLM serves packed weights of 4 and 8 bits only, these have {shown}; load them as above."
    if stated.get("quant_method") == "compressed-tensors":
        arguments = shlex.quote(f"pretrained={folder}")
        text += (
            " With transformers and the compressed-tensors package, <code>AutoModelForCausalLM.from_pretrained</code>; "
            f"and so lm-eval: <code>{esc(f'lm_eval --model hf --model_args {arguments} --tasks arc_challenge')}</code>"
        )
    return f'<p class="qd-muted qd-small">{text}</p>'


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
