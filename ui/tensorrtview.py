"""What TensorRT-LLM measured of a job's results, or why it did not, and the commands that do it elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backend.engines.trtllm_handover import SCRIPT
from backend.jobs.trtllm_metrics import GuideRow, guide_rows
from ui.format import size
from ui.layout import card, esc
from ui.madeview import download_path

Entry = Mapping[str, Any]
MAX_SCRIPT = 40_000  # bytes that are shown


def tensorrt(uid: str, entries: Sequence[Entry]) -> str:
    """One card: the guide's table of what was run, the reasons why something was not, the script of each result.

    Args:
        uid: The job.
        entries: Its saved configurations.

    Returns:
        Empty if the job has nothing to do with TensorRT-LLM.
    """
    asked = [entry for entry in entries if entry.get("ran")]
    if not asked:
        return ""
    body = _table(asked) + _reasons(asked) + "".join(_script(uid, entry) for entry in asked)
    return card(body, "In TensorRT-LLM")


def _table(entries: Sequence[Entry]) -> str:
    lines = []
    for entry in entries:
        for row in guide_rows(entry["ran"]):
            label = "Baseline, 16 bit" if row.which == "baseline" else str(entry["label"] or entry["name"])
            lines.append(f"<tr><td>{esc(label)}</td>{_cells(row)}</tr>")
    if not lines:
        return ""
    heads = "".join(
        f'<th class="qd-num" title="{esc(told)}">{esc(name)}</th>'
        for name, told in (
            ("Weights", "Bytes of the weights, or of the engine (WM in the guide)"),
            ("GPU memory", "The most that was taken, the KV cache's share included (RM in the guide)"),
            ("Tokens/s, one request", "Decoding one request at a time, without its first token"),
            ("Tokens/s, full load", "All answers together, with CONCURRENCY requests at a time"),
            ("Perplexity", "Windows of the guides' protocol, over all scored tokens"),
        )
    )
    return (
        f'<div class="qd-scroll"><table class="qd-table"><thead><tr><th>Model</th>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cells(row: GuideRow) -> str:
    values = (
        size(row.weight_bytes),
        "-" if row.memory_bytes is None else size(row.memory_bytes),
        f"{row.decode_tokens_s:.1f}",
        "-" if row.load_tokens_s is None else f"{row.load_tokens_s:.1f}",
        "-" if row.perplexity is None else f"{row.perplexity:.3f}",
    )
    return "".join(f'<td class="qd-num">{esc(value)}</td>' for value in values)


def _reasons(entries: Sequence[Entry]) -> str:
    """Why results were not run, each reason once."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        for one in entry["ran"].get("obstacles") or ():
            reasons.setdefault(str(one["reason"]), []).append(str(entry["label"] or entry["name"]))
    if not reasons:
        return ""
    lines = []
    for reason, names in reasons.items():
        which = "" if len(names) == len(entries) else f"{', '.join(names)}: "
        lines.append(f"<li>{esc(which + reason)}</li>")
    return (
        "<p>Not run on this machine, so there are no tokens per second, and none are guessed. What it lacks:</p>"
        f"<ul>{''.join(lines)}</ul>"
        "<p>To do the rest on a machine that has it, copy the model's folder there and run the script that lies in it. "
        f"<code>sh {SCRIPT}</code> builds and measures, <code>sh {SCRIPT} serve</code> serves the model on "
        "127.0.0.1:8000.</p>"
    )


def _script(uid: str, entry: Entry) -> str:
    try:
        text = (Path(str(entry["artefact"])) / SCRIPT).read_bytes()[:MAX_SCRIPT].decode(errors="replace")
    except OSError:
        return ""
    where = download_path(uid, entry, SCRIPT)
    return (
        f"<details><summary>Commands for {esc(str(entry['label'] or entry['name']))}</summary>"
        f'<p><a href="{esc(where)}" download>{SCRIPT}</a></p><pre class="qd-log">{esc(text)}</pre></details>'
    )
