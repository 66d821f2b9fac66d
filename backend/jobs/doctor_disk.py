"""The doctor's checks of files: results, leftovers, permissions, free space, engine environments.

Each returns what it looked at and its problems: what is wrong, how to mend it, and whether that was done.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import stat
import time
from pathlib import Path
from typing import Any

from backend.accounts import accounts_file, names
from backend.disk import free_bytes
from backend.engines.environments import environments
from backend.errors import QuantdeckError
from backend.jobs import deletion
from backend.jobs.publish import MANIFEST, check_manifest
from backend.jobs.results import results_of
from backend.jobs.states import ACTIVE
from backend.paths import Home
from backend.process import lock_is_held

Found = tuple[str, list[tuple[str, str, bool]]]

LEAST_FREE = 100_000_000
OLD_S = 3600.0
ONLY_WHILE_UNFINISHED = ("out.tmp", "checkpoint", "ballast")


def results(home: Home, jobs: list[dict[str, Any]], *, deep: bool) -> Found:
    """Every published model is as its manifest says: names and sizes, with `deep` also the content."""
    problems, checked = [], 0
    for job in jobs:
        folders = _published(job)
        if job["state"] == "succeeded" and not folders:
            problems.append((f"job {job['job_id']} succeeded, but has no result", _redo(job), False))
        for folder in folders:
            checked += 1
            wrong = check_manifest(folder) if deep else names_and_sizes(folder)
            problems += [(f"job {job['job_id']}: {what}", _redo(job), False) for what in wrong]
    how = "names, sizes and sha256" if deep else "names and sizes; --deep also compares the content"
    return f"{checked} models, {how}", problems


def _redo(job: dict[str, Any]) -> str:
    return f"copy the files back, or run the settings again: python -m backend export {job['job_id']}"


def _published(job: dict[str, Any]) -> list[Path]:
    """Folders of the models that the job has told to be published."""
    try:
        result = json.loads(job["result"]) if job["result"] else None
        told = [Path(entry["artefact"]) for entry in results_of(result) if entry.get("artefact")]
    except (ValueError, KeyError, TypeError):
        return []
    return told or ([Path(job["artefact"])] if job["artefact"] else [])


def names_and_sizes(folder: Path) -> list[str]:
    """`check_manifest` without reading the files."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    problems = []
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}")
    return problems


def half_published(home: Home, jobs: list[dict[str, Any]], gone: list[dict[str, Any]]) -> Found:
    """Below the folders of results lies nothing but complete results, what active jobs are working on, and `gone`."""
    active = {job["folder"] for job in jobs if job["state"] in ACTIVE} | {job["folder"] for job in gone}
    services = {home.root / job["folder"] for job in jobs}
    parents = {folder.parent for folder in services} | set((home.user_data / "jobs").glob("*"))
    problems, seen = [], 0
    for folder in sorted(child for parent in parents if parent.is_dir() for child in parent.iterdir()):
        if not folder.is_dir() or str(folder.relative_to(home.root)) in active:
            continue
        seen += 1
        for one in _innermost(folder):
            if not (one / MANIFEST).exists() and any(one.iterdir()):
                mend = f"look at it; if nothing in it is needed: rm -r {shlex.quote(str(one))}"
                problems.append((f"{one} has no manifest: it was never published completely", mend, False))
    return f"{seen} folders", problems


def _innermost(folder: Path) -> list[Path]:
    """The folders that should be results: a folder itself, or those in it if it has no manifest and no files."""
    children = list(folder.iterdir())
    inner = [child for child in children if child.is_dir()]
    if (folder / MANIFEST).exists() or not inner:
        return [folder]
    own = [folder] if len(inner) < len(children) else []
    return own + [one for child in sorted(inner) for one in _innermost(child)]


def run_folders(home: Home, jobs: list[dict[str, Any]], gone: list[dict[str, Any]], *, mend: bool) -> Found:
    """Working folders belong to known jobs, and what only an unfinished job needs is gone once it has succeeded."""
    known = {job["uid"]: job for job in jobs}
    deleted = {job["uid"] for job in gone}
    runs = home.private / "runs"
    problems, seen = [], 0
    for folder in sorted(runs.iterdir()) if runs.is_dir() else []:
        if folder.name in deleted:
            continue
        seen += 1
        job = known.get(folder.name)
        if job is None:
            if not lock_is_held(folder / "runner.lock"):
                how = f"if no backup with that job will be put back: rm -r {shlex.quote(str(folder))}"
                problems.append((f"{folder} belongs to no job of jobs.db", how, False))
        elif job["state"] == "succeeded":
            for name in ONLY_WHILE_UNFINISHED:
                if (folder / name).exists():
                    problems.append(_remove(folder / name, f"a leftover of job {job['job_id']}", mend))
    stale = time.time() - OLD_S
    for path in sorted(home.private.rglob(".*.tmp")) if home.private.is_dir() else []:
        if path.is_file() and path.stat().st_mtime < stale:
            problems.append(_remove(path, "a temporary file of a process that died", mend))
    return f"{seen} jobs", problems


def deletions(home: Home, gone: list[dict[str, Any]], *, mend: bool) -> Found:
    """No deletion for good was begun and left unfinished."""
    problems = []
    for job in gone:
        if job["erased"] != "begun":
            continue
        what, mended = f"job {job['job_id']} ({job['uid']}) is only half deleted: a program died on the way", False
        if mend:
            try:
                deletion.erase(home, job["uid"], actor="doctor")
                mended = True
            except QuantdeckError as error:
                what = f"{what}; {error.message}"
        problems.append((what, f"python -m backend delete --for-good {job['uid']}", mended))
    return f"{len(gone)} deleted jobs", problems


def _remove(path: Path, what: str, mend: bool) -> tuple[str, str, bool]:
    if mend:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    return f"{path} is {what}", "python -m backend doctor --mend", mend and not path.exists()


def disk(home: Home) -> Found:
    """There is room to work."""
    from backend.settings import Settings

    try:
        least = max(LEAST_FREE, Settings.load(home).jobs.min_free_bytes)
    except QuantdeckError:
        least = LEAST_FREE  # the mistake in the file is told by its own check
    free = free_bytes(home.root)
    detail = f"{free / 1e9:.1f} GB free"
    if free >= least:
        return detail, []
    return detail, [(f"only {free / 1e6:.0f} MB are free at {home.root}", "free some space", False)]


def permissions(home: Home, *, mend: bool) -> Found:
    """Other users of the machine can read neither accounts nor working files, and change nothing."""
    wanted = [(home.root, 0o022, "can be changed by other users"), (home.private, 0o077, "is open to other users")]
    wanted.append((accounts_file(home), 0o077, "is open to other users"))
    problems = []
    for path, forbidden, what in wanted:
        if not path.exists():
            continue
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode & forbidden:
            ours = path.stat().st_uid == os.getuid()
            if mend and ours:
                path.chmod(mode & ~forbidden)
            how = f"chmod {mode & ~forbidden:o} {shlex.quote(str(path))}"
            problems.append((f"{path} (mode {mode:o}) {what}", how, mend and ours))
    return f"{home.private} is private", problems


def readable_accounts(home: Home) -> Found:
    """The list of accounts can be read: while it cannot, nobody is let in."""
    try:
        known = names(home)
    except QuantdeckError as error:
        remedy = f"put the file right or back, or remove it and add the accounts again: {accounts_file(home)}"
        return "", [(error.message, remedy, False)]
    return f"{len(known)} accounts", []


def engine_environments() -> Found:
    """An engine's own environment is finished or absent, never half built."""
    problems, ready = [], []
    for name, env in environments().items():
        if env.ready():
            ready.append(name)
        elif env.folder.exists() and not lock_is_held(env.root / f"{env.name}-{env.hash}.lock"):
            how = f"python -m backend engines install {name}"
            problems.append((f"{env.folder} is unfinished", how, False))
    return f"{', '.join(ready) or 'none'} installed", problems
