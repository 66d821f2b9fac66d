"""Reading `Job.result`: one entry per configuration, also of jobs from before there could be several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backend.errors import JobError

if TYPE_CHECKING:
    from backend.jobs.store import Job

Entry = dict[str, Any]
"""`name`, `label`, `artefact` (folder), `rows`, `table`, `layers`, `skipped` (Linear: reason), `notes`, `manifest`,
`bytes` (of the weight files), `decode_path` (how it was run when it was measured, in words) and `reason` (why
it was not measured, or None)."""


def results_of(result: Mapping[str, Any] | None) -> list[Entry]:
    """The configurations of a job's result in the order of the YAML; empty as long as none is saved."""
    if not result:
        return []
    if "results" in result:
        return [dict(entry) for entry in result["results"]]
    if "rows" not in result and "artefact" not in result:
        return []
    keys = ("artefact", "rows", "table", "layers", "skipped", "manifest")
    missing: Entry = {"name": "", "label": "", "notes": [], "bytes": None, "reason": None, "rows": [], "layers": []}
    return [{**missing, **{key: result[key] for key in keys if key in result}}]


def measured(result: Mapping[str, Any] | None) -> list[Entry]:
    """The configurations that have been measured."""
    return [entry for entry in results_of(result) if entry.get("rows")]


def result_named(job: Job, name: str) -> Entry:
    """One configuration of a job, by its name; the first one for an empty name.

    Raises:
        JobError: If there is none of that name.
    """
    entries = results_of(job.result)
    found = next((entry for entry in entries if not name or entry["name"] == name), None)
    if found is None:
        names = ", ".join(entry["name"] for entry in entries if entry["name"]) or "none"
        raise JobError(f"job {job.job_id} has no configuration {name!r} on disk; it has {names}")
    return found


def full_name(job: Job, entry: Mapping[str, Any]) -> str:
    """The job's name, with the configuration's where the job has several."""
    several = len(results_of(job.result)) > 1
    return f"{job.job_id} / {entry['name']}" if several else job.job_id


def result_object(job: Job) -> dict[str, Any]:
    """A job's outcome as `run --json` prints it."""
    result = job.result or {}
    return {
        "job_id": job.job_id,
        "state": job.state,
        "reason": job.reason,
        "outcome": job.outcome,
        "artefact": job.artefact,
        "rows": result.get("rows", []),
        "results": results_of(result),
        "timings": result.get("timings", {}),
        "peak_rss_bytes": result.get("peak_rss_bytes"),
        "device": result.get("device"),
        "versions": result.get("versions", {}),
    }
