"""Named endpoints for programs, called with `gradio_client`: docs/api.md.

They do what the pages do, with the same checks: local paths inside the home only, a login where there are accounts,
and in a job's history the account that asked. What goes wrong is a `gr.Error` with the message a person would read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from backend.errors import ConfigError, QuantdeckError
from backend.jobs import control
from backend.jobs.export import TARGETS, export_text
from backend.jobs.results import result_object
from backend.jobs.states import ACTIVE, FINAL
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.schema import parse_file
from ui.guard import NO_LOGIN
from ui.reading import MAX_UID, briefly, whole

PER_PAGE = 50
MAX_PAGE = 10_000_000
MAX_SEARCH = 100
TOLD = (
    "uid", "job_id", "state", "reason", "outcome", "model", "algorithm", "device", "attempt", "priority", "progress",
    "artefact", "created_at", "started_at", "finished_at", "tags", "note", "deleted_at",
)  # fmt: skip
"""What `status` and `list_jobs` tell of a job: `Job`'s attributes of these names."""


def add_api(home: Home) -> None:
    """Adds the endpoints to the Blocks of the present context."""

    def submit(yaml: str, request: gr.Request) -> dict:
        """Check a job file, in YAML or JSON, and queue the job; answers as `status`."""
        with told_plainly():
            text = parse_file(_text("yaml", yaml)).dump()
            return job_facts(control.submit(home, text, confined=True, actor=actor_of(request)))

    def status(job_id: str) -> dict:
        """Where a job stands; `job_id` is its uid or its JOB_ID (the newest of that name)."""
        with told_plainly():
            return job_facts(_find(home, job_id))

    def cancel(job_id: str, request: gr.Request) -> dict:
        """Ask for the end of a job; answers as `status`."""
        with told_plainly():
            return job_facts(control.cancel(home, _find(home, job_id).uid, actor=actor_of(request)))

    def result(job_id: str) -> dict:
        """What came out of a job, as `python -m backend run --json` prints it; `rows` is empty before the end."""
        with told_plainly():
            return result_object(_find(home, job_id))

    def list_jobs(state: str = "", search: str = "", page: int = 1) -> list[dict]:
        """Jobs, newest first, 50 a page; `search` looks in name, model, algorithm, uid, tags and note."""
        with told_plainly():
            states = ((_choice("state", state, (*ACTIVE, *FINAL))),) if state != "" else ()
            text = _text("search", search)[:MAX_SEARCH]
            if isinstance(page, bool) or not isinstance(page, int) or not 1 <= page <= MAX_PAGE:
                raise _wrong("page", page, f"a whole number from 1 to {MAX_PAGE:,}")
            store = JobStore(home)
            found = store.summaries(states=states, search=text, limit=PER_PAGE, offset=(page - 1) * PER_PAGE)
            return [job_facts(job) for job in found]

    def export(job_id: str, target: str = "yaml") -> str:
        """A job's settings: its YAML, or as a Nyuntam file, an llm-compressor recipe or a shell command."""
        with told_plainly():
            return export_text(_find(home, job_id).config_yaml, _choice("target", target, TARGETS))

    for endpoint in (submit, status, cancel, result, list_jobs, export):
        gr.api(endpoint, api_name=endpoint.__name__)


def actor_of(request: gr.Request) -> str:
    """Who asks, for a job's history: `api`, with the account's name where there are accounts."""
    return "api" if request.username in (None, NO_LOGIN) else f"api {request.username}"


def job_facts(job: Job) -> dict[str, Any]:
    """What `status` answers."""
    return {name: getattr(job, name) for name in TOLD} | {"tags": list(job.tags)}


@contextmanager
def told_plainly() -> Iterator[None]:
    """Within the block errors that are meant for users reach the caller as they are; a busy store soon."""
    try:
        with briefly():
            yield
    except QuantdeckError as error:
        raise gr.Error(error.message, print_exception=False) from error


def _find(home: Home, job_id: Any) -> Job:
    return JobStore(home).get(_text("job_id", job_id)[:MAX_UID])


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "a text")
    return whole(value)


def _choice(key: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    if not isinstance(value, str) or value not in allowed:
        raise _wrong(key, value, f"one of {', '.join(allowed)}")
    return value


def _wrong(key: str, value: Any, allowed: str) -> ConfigError:
    return ConfigError(f"found {whole(repr(value))[:60]}; it must be {allowed}", key=key, value=value)
