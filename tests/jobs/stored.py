"""Jobs in a store, without any work: for tests of the store and the scheduler."""

from __future__ import annotations

from backend.jobs.store import Job, JobStore
from backend.schema import parse_yaml
from tests.conftest import demo_text


def make(store: JobStore, job_id: str = "one", device: str = "cpu", **keys: object) -> Job:
    """A queued job with these keys in its file."""
    text = demo_text(job_id, **keys)
    return store.create(text, parse_yaml(text).config, device=device)


def start(store: JobStore, job: Job, *resources: str) -> bool:
    """Take a job to `running`, as the scheduler and its runner do."""
    attempt = store.get(job.uid).attempt
    return store.grant(job.uid, attempt, resources) and store.move(job.uid, "running", actor="runner", attempt=attempt)


def states(store: JobStore) -> dict[str, str]:
    """Name -> state of every job."""
    return {job.job_id: job.state for job in store.summaries(limit=100_000)}
