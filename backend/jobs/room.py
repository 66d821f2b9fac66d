"""Whether what a job downloads and makes has room on the disks of this machine."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from backend.disk import existing_folder, free_bytes
from backend.engines.configurations import Configuration
from backend.errors import ConfigError
from backend.paths import Home
from backend.schema import JobConfig

ROOM = 2.2
"""Disk space that a result needs while it is made, in its own sizes: once as it grows, once as finished shards."""


@dataclass(frozen=True)
class Room:
    """Disk space that a job needs.

    Attributes:
        download: Bytes that are fetched and kept in its cache; 0 if nothing is.
        results: Bytes that its results need while they are made.
    """

    download: int
    results: int


def room_of(planned: Sequence[Configuration], predicted: dict[str, int], weights: int, download: int | None) -> Room:
    """What a job needs at most.

    Args:
        planned: Its results.
        predicted: Name -> size, of those that are known before.
        weights: Bytes of the model: no result is larger.
        download: Bytes to be fetched; None if that is not known.
    """
    return Room(download or 0, int(sum(predicted.get(one.name) or weights for one in planned) * ROOM))


def check_room(home: Home, config: JobConfig, room: Room, n_results: int) -> None:
    """Refuse a job that does not fit.

    Raises:
        ConfigError: With what it needs, what is free, and what to do.
    """
    results, cache = home.artefact_dir(config), home.cache_dir(config)
    advice = "free some space, or give a folder on another disk with --home"
    together = room.download > 0 and _device(results) == _device(cache)
    if not together and room.download > (free := free_bytes(cache)):
        raise ConfigError(
            f"the model's download has {amount(room.download)}, and the disk of {existing_folder(cache)} has "
            f"{amount(free)} free; {advice}",
            key="CACHE_PATH" if config.CACHE_PATH else "USER_FOLDER",
            value=config.CACHE_PATH or config.USER_FOLDER,
        )
    needs = "its result needs" if n_results == 1 else f"its {n_results} results need"
    told = f"{needs} up to {amount(room.results)} while they are made"
    if together:
        told = f"the model's download has {amount(room.download)}, {told}"
    free = free_bytes(results)
    if room.results + (room.download if together else 0) > free:
        raise ConfigError(
            f"{told}, and the disk of {existing_folder(results)} has {amount(free)} free; {advice}",
            key="USER_FOLDER",
            value=config.USER_FOLDER,
        )


def _device(folder: Path) -> int:
    return os.stat(existing_folder(folder)).st_dev


def amount(n_bytes: float) -> str:
    """A size for people, three digits."""
    return f"{n_bytes / 1e9:.3g} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.3g} MB"
