"""A job as the store tells of it, and the other rows of jobs.db that programs look at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from backend.jobs.states import ACTIVE, State


@dataclass(frozen=True)
class Job:
    """One row of `jobs`.

    Attributes:
        uid: Id made by the store; sorts by creation.
        job_id: The YAML's JOB_ID.
        folder: Where the artefact is published, relative to the home.
        device: `cpu`, `cuda:N` or `cuda:N,M`, decided when the job was created.
        state: One of `backend.jobs.states`.
        attempt: 1, and one more each time it was queued again.
        reason: Why it waits, failed or was cancelled; None otherwise.
        progress: `stage`, `step`, `total`, `eta_s`, `message`, `configuration` of the present stage.
        result: Rows, timings and the like once measured; see `backend.jobs.results`.
        artefact: Absolute path of the published model (of several: the first one's), None until it is.
        priority: Jobs of a higher one start first.
        max_attempts: How often it is started at most before somebody has to resume it.
        time_limit_s: Seconds an attempt may run, None without a limit.
        outcome: How the last attempt ended, one of the codes of `backend.jobs.outcomes`, or None.
        heartbeat: Counts up while the runner is well.
        stalled: True if the heartbeat stands still although the runner lives.
        redo: `measure` if what was measured before is to be measured again, else empty.
        tags: Words that people gave it, see `backend.jobs.labels`.
        note: What people noted about it.
        deleted_at: When it was deleted; None unless it is.
        erased: `begun` if it is being deleted for good, and what is left of it may be incomplete.
    """

    uid: str
    job_id: str
    folder: str
    model: str
    algorithm: str
    device: str
    state: State
    reason: str | None
    attempt: int
    config_yaml: str
    artefact: str | None
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] | None = None
    priority: int = 0
    max_attempts: int = 3
    time_limit_s: float | None = None
    outcome: str | None = None
    heartbeat: int = 0
    stalled: bool = False
    redo: str = ""
    tags: tuple[str, ...] = ()
    note: str = ""
    deleted_at: str | None = None
    erased: str | None = None

    @property
    def is_active(self) -> bool:
        """True until the job has reached a final state."""
        return self.state in ACTIVE


@dataclass(frozen=True)
class Lease:
    """A resource in use: `cpu:<slot>` or `gpu:<UUID>`, and the attempt that holds it."""

    resource: str
    uid: str
    attempt: int
    at: str


@dataclass(frozen=True)
class Instance:
    """A dashboard or a scheduler that works on this home; `started` are the clock ticks of /proc/<pid>/stat."""

    id: int
    kind: str
    host: str
    pid: int
    started: int
    boot_id: str
    at: str
