"""AQLM's check: what was written is loaded by transformers with the aqlm package, and gives the same answers.

The original system converts pickles to a checkpoint here. Ours is a checkpoint from the start; what is left is to see
that other programs read the same model in it. Run as `python -m backend.engines.aqlm_convert REQUEST.json RESULT.json`
by a job's runner.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from backend.child import run_child
from backend.event_stream import EventWriter


def convert(request: dict[str, Any], events: EventWriter) -> dict[str, Any]:
    """Check a checkpoint folder; nothing in it is changed.

    Args:
        request: `folder`, and `configuration` (its name) if there are several.
        events: Takes progress events.

    Returns:
        `linears` (quantized in the other program), `difference` (largest, of logits), `tolerance`.
    """
    about = {"configuration": request["configuration"]} if "configuration" in request else {}
    events.note(stage="convert", message="loading with transformers and aqlm, comparing", **about)
    from backend.formats.aqlm_check import check_reload

    return asdict(check_reload(request["folder"]))


if __name__ == "__main__":
    run_child(convert)
