"""Publishing an artefact: complete with a manifest, or not at all.

Whatever moment the program or the machine dies at, the target either does not exist or is whole: its manifest and all
files are on the disk before the one rename that makes it visible. An attempt that finds it there, with a manifest of
its own job and content, goes on from that (`models.Making.is_published`).
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from backend.disk import DiskFullError, is_disk_full
from backend.errors import JobError
from backend.files import sha256_file, sync_path
from backend.process import failpoint

MANIFEST = "quantdeck_manifest.json"


def publish(staging: Path, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Give a finished folder its manifest and move it to its place in one step.

    Args:
        staging: Folder with the finished files, on the same file system as `target`.
        target: Where readers look; must not exist.
        facts: What else the manifest tells (job, versions, settings).

    Returns:
        The manifest: the facts and `files`, each with `bytes` and `sha256`.

    Raises:
        JobError: If the target already exists.
        DiskFullError: If the manifest does not fit on the disk; the target does not exist then.
    """
    files = sorted(p for p in staging.rglob("*") if p.is_file() and p != staging / MANIFEST)
    listed = {p.relative_to(staging).as_posix(): {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}
    manifest = {**facts, "files": listed}
    text = json.dumps(manifest, indent=2) + "\n"
    failpoint("publish.begin")
    try:
        (staging / MANIFEST).write_text(text, encoding="utf-8")
        failpoint("publish.manifest")
        folders = sorted({folder for path in files for folder in path.parents if folder.is_relative_to(staging)})
        for path in (*files, staging / MANIFEST, *reversed(folders)):
            sync_path(path)
        failpoint("publish.synced")
        _make_folders(target.parent)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(staging / MANIFEST, len(text.encode())) from error
        raise
    if target.exists():
        raise JobError(f"{target} already exists; the finished model stays in {staging}, nothing was overwritten")
    failpoint("publish.ready")
    os.rename(staging, target)
    failpoint("publish.renamed")
    sync_path(target.parent)
    failpoint("publish.done")
    return manifest


def _make_folders(folder: Path) -> None:
    """Make a folder and those above it, and have each new name reach the disk."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        sync_path(path.parent)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published folder; None if there is none that can be read."""
    try:
        return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def check_manifest(folder: Path) -> list[str]:
    """Compare a published folder with its manifest.

    Returns:
        What is wrong, one sentence each; empty if every file is as it was published.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST} cannot be read: {error}"]
    problems = []
    for name, facts in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{path} is missing")
        elif path.stat().st_size != facts["bytes"]:
            problems.append(f"{path} has {path.stat().st_size} bytes, the manifest says {facts['bytes']}")
        elif sha256_file(path) != facts["sha256"]:
            problems.append(f"{path} was changed after it was published (sha256 differs)")
    return problems
