"""What can be downloaded of a job: its YAML, its log, its numbers, its bundle, and the files of its models.

A request names a job by its id and a file by its name; where that lies is looked up, never taken from the request.
Everything is sent as an attachment that a browser does not open.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from backend.errors import QuantdeckError
from backend.evaluate.compare import RENDERERS, comparison_rows
from backend.jobs import control
from backend.jobs.bundle import bundle
from backend.jobs.export import export_text
from backend.jobs.export_notes import OTHERS
from backend.jobs.logs import files
from backend.jobs.results import results_of
from backend.jobs.store import Job, JobStore
from backend.paths import Home

UID = re.compile(r"[0-9a-f]{22}")
TABLES = {"csv": "text/csv; charset=utf-8", "json": "application/json"}
INERT = "default-src 'none'; sandbox; frame-ancestors 'none'"


class OpenFile(FileResponse):
    """A file that is already open, so that it cannot be exchanged between the check and the sending."""

    def __init__(self, descriptor: int, name: str) -> None:
        self.descriptor = descriptor
        path = f"/proc/self/fd/{descriptor}"
        super().__init__(
            path, media_type="application/octet-stream", headers=attachment(name), stat_result=os.fstat(descriptor)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, or the range that was asked for, and close it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self.descriptor)


def attachment(name: str) -> dict[str, str]:
    """The headers that make an answer a download of this name."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[:200] or "download"
    return {"Content-Disposition": f'attachment; filename="{safe}"', "Content-Security-Policy": INERT}


def add_downloads(app: FastAPI, home: Home) -> None:
    """Adds `/download/...`."""

    @app.get("/download/{uid}.yaml")
    def job_file(uid: str) -> Response:
        """The job's YAML exactly as it was submitted."""
        job = _job(home, uid)
        if job is None:
            return _missing()
        return Response(job.config_yaml, media_type="application/yaml", headers=attachment(f"{job.job_id}.yaml"))

    @app.get("/download/{uid}.log")
    def log(uid: str) -> Response:
        """The job's whole log, oldest lines first."""
        job = _job(home, uid)
        if job is None:
            return _missing()
        try:
            path = control.log_path(home, job.uid)
        except QuantdeckError:
            return _missing()
        found = files.parts(path)
        if not found or any(part.is_symlink() for part in found):
            return _missing()
        return StreamingResponse(
            files.read_all(path), media_type="text/plain; charset=utf-8", headers=attachment(f"{job.job_id}.log")
        )

    @app.get("/download/{uid}.zip")
    def reproduce(uid: str) -> Response:
        """All that makes the job's result again, without the weights."""
        job = _job(home, uid)
        if job is None:
            return _missing()
        return _made(lambda: bundle(job), "application/zip", f"{job.job_id}.zip")

    @app.get("/download/{uid}.{kind}")
    def numbers(uid: str, kind: str) -> Response:
        """The job's measurements as CSV or JSON."""
        job = _job(home, uid) if kind in TABLES else None
        if job is None:
            return _missing()
        return _made(lambda: RENDERERS[kind](comparison_rows([job])) + "\n", TABLES[kind], f"{job.job_id}.{kind}")

    @app.get("/download/{uid}/{target}.yaml")
    def for_another_program(uid: str, target: str) -> Response:
        """The job's settings as a file of another program."""
        job = _job(home, uid) if target in OTHERS else None
        if job is None:
            return _missing()
        return _made(lambda: export_text(job.config_yaml, target), "application/yaml", f"{job.job_id}.{target}.yaml")

    @app.get("/download/{uid}/{name}/{file:path}")
    def model_file(uid: str, name: str, file: str) -> Response:
        """One file of a quantized model; only what its manifest lists is handed out."""
        job = _job(home, uid)
        entries = results_of(job.result) if job else []
        entry = next((e for e in entries if name == (e["name"] or "model")), None)
        listed = ((entry or {}).get("manifest") or {}).get("files") or {}
        if entry is None or file not in listed or not entry.get("artefact"):
            return _missing()
        *below, last = file.split("/")
        descriptor = open_inside(home.root, Path(str(entry["artefact"])).joinpath(*below), last)
        return _missing() if descriptor is None else OpenFile(descriptor, last)


def _job(home: Home, uid: str) -> Job | None:
    if not UID.fullmatch(uid):
        return None
    try:
        return JobStore(home).get(uid)
    except QuantdeckError:
        return None


def _made(make: Callable[[], str | bytes], media_type: str, name: str) -> Response:
    """What is made for this answer, as a file of that name; if it cannot be made, why."""
    try:
        content = make()
    except QuantdeckError as error:
        return PlainTextResponse(error.message, status_code=404)
    return Response(content, media_type=media_type, headers=attachment(name))


def _missing() -> Response:
    return PlainTextResponse("There is no such job, or it has no such file.", status_code=404)


def open_inside(root: Path, folder: Path, name: str) -> int | None:
    """Open a regular file of a folder below `root` for reading; nothing on the way to it may be a symbolic link.

    Each folder is opened from the one above it, so that none can be exchanged for a link meanwhile.

    Returns:
        A file descriptor, or None if there is no such file.
    """
    one_name = name not in ("", ".", "..") and "/" not in name and "\0" not in name
    if not one_name or ".." in folder.parts or not folder.is_relative_to(root):
        return None
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    with suppress(OSError):
        inside = os.open(root, flags & ~os.O_NOFOLLOW | os.O_DIRECTORY)
        try:
            for part in folder.relative_to(root).parts:
                above, inside = inside, os.open(part, flags | os.O_DIRECTORY, dir_fd=inside)
                os.close(above)
            descriptor = os.open(name, flags, dir_fd=inside)
        finally:
            os.close(inside)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    return None
