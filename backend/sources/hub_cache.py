"""Models that were downloaded before, which need no network: in the jobs' caches, and in huggingface_hub's own.

The inventory only reads. A copy that is cut short, damaged, or no model for us stands in it with the reason.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from backend.errors import CheckpointError, ModelError
from backend.formats.config import SIDE_FILES
from backend.formats.headers import weight_files
from backend.paths import Home
from backend.sources.models import is_repo_id
from backend.sources.quick_check import quick_check

MAIN = "main"
NOT_WHOLE = "its files are not whole"
KEPT_S = 20.0
MOST_KEPT = 16
_kept: dict[tuple[Path, ...], tuple[float, Inventory]] = {}


@dataclass(frozen=True)
class CachedModel:
    """A model in a cache.

    Attributes:
        id: Value for `MODEL`.
        commit: Which revision of it.
        is_main: Whether that was the newest of the main branch when it was downloaded; others need `REVISION`.
        bytes: Size of its files.
        ours: Whether it is in a cache of the jobs; otherwise in the one of huggingface_hub, which is only read.
        folder: Where its files are.
        used: When its tokenizer was read last, seconds since 1970, as far as the disk notes that; without one, when
            it came.
        whole: Whether all its weight files are there.
        refused: Why it cannot be quantized as it is; None if it can.
    """

    id: str
    commit: str
    is_main: bool
    bytes: int
    ours: bool
    folder: Path
    used: float = field(default=0.0, compare=False)
    whole: bool = True
    refused: str | None = None


@dataclass(frozen=True)
class Inventory:
    """What is in the caches.

    Attributes:
        models: By name; one that two caches have is told once, as ours.
        damaged: Names of entries that are no cache entries any more, e.g. without their files.
    """

    models: tuple[CachedModel, ...] = ()
    damaged: tuple[str, ...] = field(default=())


def cache_folders(home: Home, cache_path: str | None = None) -> tuple[Path, ...]:
    """The jobs' caches, the one that CACHE_PATH names first, and that of huggingface_hub, which all programs share."""
    from huggingface_hub import constants

    named = home.root / cache_path / "hub" if cache_path and _is_inside(home, cache_path) else None
    ours = home.user_data / ".cache" / "hub"
    return tuple(dict.fromkeys(filter(None, (named, ours, Path(constants.HF_HUB_CACHE)))))


def _is_inside(home: Home, cache_path: str) -> bool:
    """Whether a CACHE_PATH, which may come from a page, stays in the home."""
    try:
        return (home.root / cache_path).resolve().is_relative_to(home.root.resolve())
    except (OSError, RuntimeError, ValueError):
        return False


def inventory(home: Home, cache_path: str | None = None) -> Inventory:
    """Everything in the caches that is a transformers model, or was to become one."""
    now = time.monotonic()
    folders = cache_folders(home, cache_path)
    until, found = _kept.get((home.root, *folders), (0.0, Inventory()))
    if now >= until:
        models: dict[tuple[str, str], CachedModel] = {}
        damaged: list[str] = []
        for folder in reversed(folders):
            models |= {(m.id, m.commit): m for m in _scan(folder, damaged, ours=folder != folders[-1])}
        found = Inventory(tuple(sorted(models.values(), key=lambda m: (m.id.lower(), not m.is_main, m.commit))),
                          tuple(sorted(set(damaged))))  # fmt: skip
        while len(_kept) >= MOST_KEPT:
            _kept.pop(next(iter(_kept)), None)
        _kept[(home.root, *folders)] = (now + KEPT_S, found)
    return found


def cached_models(home: Home, cache_path: str | None = None) -> tuple[CachedModel, ...]:
    """The whole models of all caches."""
    return tuple(model for model in inventory(home, cache_path).models if model.whole)


def find_cached(home: Home, repo_id: str, revision: str | None, cache_path: str | None = None) -> CachedModel | None:
    """The model that a job would use without a network; None if it is in no cache."""
    models = cached_models(home, cache_path)
    return next((m for m in models if m.id == repo_id and (m.commit == revision if revision else m.is_main)), None)


def snapshot(folder: Path, repo_id: str, revision: str | None) -> Path | None:
    """The whole copy of a model in one cache, found without looking at the others; None if there is none.

    Args:
        folder: The cache.
        repo_id: The model.
        revision: Branch, tag or commit; None for the main branch.
    """
    from huggingface_hub import try_to_load_from_cache

    try:
        config = try_to_load_from_cache(repo_id, "config.json", cache_dir=folder, revision=revision)
    except (OSError, ValueError):
        return None
    found = Path(config).parent if isinstance(config, str) else None
    return found if found is not None and _has_weights(found) else None


def _scan(folder: Path, damaged: list[str], *, ours: bool) -> Iterator[CachedModel]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found = scan_cache_dir(folder)
    except (CacheNotFound, ValueError, OSError):  # no folder, a file in its place, or not to be read
        return
    present = {path.name for path in folder.iterdir()}
    damaged += [_name(entry) for entry in present for warning in found.warnings if f"/{entry}" in str(warning)]
    for repo in found.repos:
        for revision in repo.revisions if repo.repo_type == "model" and is_repo_id(repo.repo_id) else ():
            names = {file.file_name for file in revision.files}
            if "config.json" in names or any(name.endswith(".safetensors") for name in names):
                path = revision.snapshot_path
                yield CachedModel(
                    id=repo.repo_id, commit=revision.commit_hash, is_main=MAIN in revision.refs,
                    bytes=revision.size_on_disk, ours=ours, folder=path,
                    used=max((f.blob_last_accessed for f in revision.files if not _is_looked_at(f.file_name)),
                             default=revision.last_modified),
                    whole="config.json" in names and _has_weights(path),
                    refused=_refused(path, revision.last_modified),
                )  # fmt: skip


def _is_looked_at(name: str) -> bool:
    """Whether the inventory itself reads a file, so that its time of reading tells nothing."""
    return name in (*SIDE_FILES, "config.json") or name.endswith((".safetensors", ".index.json"))


def _name(entry: str) -> str:
    """`models--team--small` as people know it."""
    return entry.partition("--")[2].replace("--", "/") or entry


def _has_weights(folder: Path) -> bool:
    """Whether all weight files are there; a download that was given up leaves some of them out."""
    try:
        return bool(weight_files(folder))
    except (CheckpointError, OSError):
        return False


@lru_cache(maxsize=512)
def _refused(folder: Path, changed: float) -> str | None:
    """Why a model cannot be quantized, without the place where it lies; read again when it has changed."""
    try:
        quick_check(folder)
    except CheckpointError as error:
        return f"{NOT_WHOLE}: {_without(folder, error.message)}"
    except (ModelError, OSError, TypeError, ValueError) as error:
        return _without(folder, error.message if isinstance(error, ModelError) else "it cannot be read")
    return None


def _without(folder: Path, text: str) -> str:
    """A message about a folder of a cache; where the cache is on this machine is not the page's to tell."""
    return text.replace(f"{folder}/", "").replace(f"{folder}: ", "").replace(str(folder), "it")
