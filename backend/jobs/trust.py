"""Whether a job may run code that comes with its model: it has to ask for it, and the operator to allow it."""

from __future__ import annotations

from pathlib import Path

from backend.engines.registry import engine_name
from backend.errors import ConfigError
from backend.formats.remote_code import SETTING
from backend.jobs.store import Job
from backend.paths import Home
from backend.schema import JobConfig, parse_yaml
from backend.settings import Settings


def check_remote_code(config: JobConfig, settings: Settings) -> None:
    """Refuse a job that asks for it where the operator or its engine does not allow it.

    Raises:
        ConfigError: If so.
    """
    if not config.TRUST_REMOTE_CODE:
        return
    reason = ""
    if not settings.models.allow_remote_code:
        reason = f"only where the operator allows it ({SETTING}) may a job run code that comes with a model"
    elif engine_name(config) == "autoawq":
        reason = "the autoawq package knows its own list of architectures and runs no other code; use ENGINE: native"
    if reason:
        raise ConfigError(f"found True; {reason}", key="TRUST_REMOTE_CODE", value=True)


def code_modules(home: Home, job: Job) -> Path | None:
    """Where the programs of a job keep copies of its model's modules; None if the job runs no such code.

    Raises:
        ConfigError: If the job asks for it and may not (any more).
    """
    config = parse_yaml(job.config_yaml).config
    check_remote_code(config, Settings.load(home))
    return home.run_dir(job.uid) / "modules" if config.TRUST_REMOTE_CODE else None
