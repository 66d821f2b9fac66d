"""The states of a job and the moves between them.

queued -> starting (has its resources, its runner was launched) -> running -> succeeded | failed
starting | running -> cancelling -> cancelled
starting | running -> lost (the runner is gone) -> queued (the next attempt) | failed
queued | lost -> cancelled
failed | cancelled -> queued (resumed by a user, with the next attempt number)
succeeded -> queued (only to do a part of it again)

The attempt number is the fence: every write names the attempt it acts for, and an older one changes nothing.
"""

from __future__ import annotations

from typing import Literal

State = Literal["queued", "starting", "running", "cancelling", "lost", "succeeded", "failed", "cancelled"]

ACTIVE: tuple[State, ...] = ("queued", "starting", "running", "cancelling", "lost")
FINAL: tuple[State, ...] = ("succeeded", "failed", "cancelled")
STARTED: tuple[State, ...] = ("starting", "running", "cancelling")
"""States in which a job has resources and should have a runner."""

MOVES: dict[State, tuple[State, ...]] = {
    "queued": ("starting", "cancelled", "failed"),
    "starting": ("running", "failed", "cancelling", "lost"),
    "running": ("succeeded", "failed", "cancelling", "lost"),
    "cancelling": ("cancelled", "failed"),
    "lost": ("queued", "failed", "cancelled"),
    "succeeded": ("queued",),
    "failed": ("queued",),
    "cancelled": ("queued",),
}


def sources_of(state: State) -> tuple[State, ...]:
    """The states from which a job may move to `state`."""
    return tuple(source for source, targets in MOVES.items() if state in targets)
