"""The states of a job and the moves between them.

queued -> running -> succeeded | failed
queued -> cancelled
running -> cancelling -> cancelled
any active state -> failed   (the runner died, or a stage failed while cancelling)
failed | cancelled -> queued (resumed: the same job, with the next attempt number)
"""

from __future__ import annotations

from typing import Literal

State = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]

ACTIVE: tuple[State, ...] = ("queued", "running", "cancelling")
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")

MOVES: dict[State, tuple[State, ...]] = {
    "queued": ("running", "cancelled", "failed"),
    "running": ("succeeded", "failed", "cancelling"),
    "cancelling": ("cancelled", "failed"),
    "succeeded": (),
    "failed": ("queued",),
    "cancelled": ("queued",),
}


def sources_of(state: State) -> tuple[State, ...]:
    """The states from which a job may move to `state`."""
    return tuple(source for source, targets in MOVES.items() if state in targets)
