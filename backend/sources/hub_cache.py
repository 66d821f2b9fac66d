"""Models that were downloaded before, which need no network: in the jobs' cache, and in huggingface_hub's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError
from backend.formats.headers import weight_files
from backend.paths import Home
from backend.sources.models import is_repo_id

MAIN = "main"
KEPT_S = 20.0
_kept: dict[Path, tuple[float, tuple[CachedModel, ...]]] = {}


@dataclass(frozen=True)
class CachedModel:
    """A whole model in a cache.

    Attributes:
        id: Value for `MODEL`.
        commit: Which revision of it.
        is_main: Whether that was the newest of the main branch when it was downloaded; others need `REVISION`.
        bytes: Size of its files.
        ours: Whether it is in the jobs' cache; otherwise in the one of huggingface_hub, which is only read.
        folder: Where its files are.
    """

    id: str
    commit: str
    is_main: bool
    bytes: int
    ours: bool
    folder: Path


def cache_folders(home: Home) -> tuple[Path, Path]:
    """The jobs' cache, and that of huggingface_hub, which all programs of this user share."""
    from huggingface_hub import constants

    return home.user_data / ".cache" / "hub", Path(constants.HF_HUB_CACHE)


def cached_models(home: Home) -> tuple[CachedModel, ...]:
    """Every whole model of both caches, by name; one that both have is told once, as ours."""
    now = time.monotonic()
    until, found = _kept.get(home.root, (0.0, ()))
    if now >= until:
        ours, shared = cache_folders(home)
        models = {(m.id, m.commit): m for folder in (shared, ours) for m in _scan(folder, ours=folder == ours)}
        found = tuple(sorted(models.values(), key=lambda m: (m.id.lower(), not m.is_main, m.commit)))
        _kept[home.root] = (now + KEPT_S, found)
    return found


def find_cached(home: Home, repo_id: str, revision: str | None) -> CachedModel | None:
    """The model that a job would use without a network; None if it is in no cache."""
    return next(
        (m for m in cached_models(home) if m.id == repo_id and (m.commit == revision if revision else m.is_main)), None
    )


def _scan(folder: Path, *, ours: bool) -> Iterator[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(folder).repos
    except (CacheNotFound, ValueError, OSError):  # no folder, a file in its place, or not to be read
        return
    for repo in repos:
        for revision in repo.revisions if repo.repo_type == "model" and is_repo_id(repo.repo_id) else ():
            if (revision.snapshot_path / "config.json").is_file() and _has_weights(revision.snapshot_path):
                yield CachedModel(
                    id=repo.repo_id, commit=revision.commit_hash, is_main=MAIN in revision.refs,
                    bytes=revision.size_on_disk, ours=ours, folder=revision.snapshot_path,
                )  # fmt: skip


def _has_weights(folder: Path) -> bool:
    """Whether all weight files are there; a download that was given up leaves some of them out."""
    try:
        return bool(weight_files(folder))
    except (CheckpointError, OSError):
        return False
