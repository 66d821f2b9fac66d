"""Publishing an artefact: complete with a manifest, or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from backend.errors import JobError
from backend.files import sha256_file, sync_path

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
    """
    files = sorted(p for p in staging.iterdir() if p.is_file() and p.name != MANIFEST)
    manifest = {**facts, "files": {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}}
    (staging / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in (*files, staging / MANIFEST, staging):
        sync_path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise JobError(f"{target} already exists; the finished model stays in {staging}, nothing was overwritten")
    os.rename(staging, target)
    sync_path(target.parent)
    return manifest


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
