"""Which local folders and files a job may read and write.

Whoever starts jobs on the command line may name any folder that is theirs to read. The web page may not: people who
reach it get no view of the rest of the disk, so its paths are confined to the folders of models that the operator
has named. Symbolic links are followed before that is decided. Imports no torch.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from backend.errors import ConfigError, ConfigErrors
from backend.paths import Home
from backend.schema import JobConfig
from backend.settings import Settings

NEVER = tuple(Path(root) for root in ("/proc", "/sys", "/dev"))
"""Not files of anybody: reading them may never end, or show what belongs to other programs."""
MAX_FILES = 10_000


def local_place(name: str, home: Home, *, key: str, confined: bool, wanted: str) -> Path:
    """An existing folder or regular file that a job file names, symbolic links resolved.

    Args:
        name: As in the job file; relative paths start at the home.
        home: The home.
        key: Key of the job file, for errors.
        confined: True for requests of the web page: only inside the folders of `Settings.model_roots`, with
            everything that a folder holds.
        wanted: What the path should be, for errors: "a folder with config.json and safetensors files".

    Raises:
        ConfigErrors: If it does not exist, is a pipe, socket or device, or lies elsewhere. A confined request learns
            nothing about paths outside, not even whether they exist.
    """
    roots = Settings.load(home).model_roots(home) if confined else ()
    path = _resolved(name, home, key, confined)
    if confined and not _is_inside(path, roots):
        raise _outside(name, key, roots)
    if any(path.is_relative_to(root) for root in NEVER):
        raise _refused(f"found {name!r}; files of the system are not read. Give {wanted}", key, name)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        reason = f"{path} does not exist" if missing else f"{path} cannot be read ({error.strerror})"
        raise _refused(f"found {name!r}, but {reason}; give {wanted}", key, name) from None
    if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
        raise _refused(f"found {name!r}, which is a pipe, socket or device; give {wanted}", key, name)
    if confined and stat.S_ISDIR(mode):
        _check_inside(path, roots, name, key)
    return path


def _resolved(name: str, home: Home, key: str, confined: bool) -> Path:
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        raise _refused(f"found {name!r}, which holds characters that no path has", key, name)
    if confined and (name.startswith("~") or ".." in Path(name).parts):
        raise _refused(f"found {name!r}; from this page give a path without '~' and '..'", key, name)
    try:
        return (home.root / Path(name).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # no such user, a circle of links, a name beyond all limits
        raise _refused(f"found {name!r}, which is no path on this machine ({error})", key, name) from None


def _is_inside(path: Path, roots: Iterable[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _check_inside(folder: Path, roots: Sequence[Path], name: str, key: str) -> None:
    """Refuse a folder with links that lead out of the roots, or with anything but folders and regular files."""
    seen = 0
    for parent, folders, files in os.walk(folder):
        for entry in (*folders, *files):
            seen += 1
            path = Path(parent, entry)
            shown = path.relative_to(folder)
            if seen > MAX_FILES:
                raise _refused(f"found {name!r}, which holds more than {MAX_FILES} files", key, name)
            try:
                real = path.resolve() if path.is_symlink() else path
                mode = real.lstat().st_mode
            except (OSError, RuntimeError):
                raise _refused(f"found {name!r}, whose {shown} is a link to nothing", key, name) from None
            if not _is_inside(real, roots):
                raise _refused(f"found {name!r}, whose {shown} is a link that leads outside of it", key, name)
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise _refused(f"found {name!r}, whose {shown} is a pipe, socket or device", key, name)


def check_outputs(config: JobConfig, home: Home) -> None:
    """Refuse folders to write to that lead out of the home through symbolic links, or into other jobs' files.

    The schema refuses absolute paths and `..`; this follows the links that are on the disk.

    Raises:
        ConfigErrors: With every key whose folder lies elsewhere.
    """
    root = home.root.resolve()
    own = (home.private.resolve(), home.jobs_db.resolve())
    results = (home.root / config.USER_FOLDER / "jobs", home.user_data / "jobs")
    problems = []
    for key, value, path in (
        ("USER_FOLDER", config.USER_FOLDER, home.artefact_dir(config)),
        ("LOGGING_PATH" if config.LOGGING_PATH else "USER_FOLDER", config.LOGGING_PATH, home.log_file(config)),
        ("CACHE_PATH" if config.CACHE_PATH else "USER_FOLDER", config.CACHE_PATH, home.cache_dir(config)),
    ):
        try:
            real = path.resolve()
            special = real.exists() and not (real.is_dir() or real.is_file())
        except (OSError, RuntimeError, ValueError) as error:
            problems.append(ConfigError(f"{path} is no usable path ({error})", key=key, value=value))
            continue
        if special or not real.is_relative_to(root):
            what = "is a pipe, socket or device" if special else "leads out of the home folder through a symbolic link"
            problems.append(
                ConfigError(f"{path} {what}; to write to another disk, give a folder there with --home",
                            key=key, value=value or config.USER_FOLDER)
            )  # fmt: skip
            continue
        taken = [*own, *(r.resolve() for r in results if key != "USER_FOLDER")]
        if any(real.is_relative_to(place) for place in taken):
            message = f"{path} lies where Quantdeck keeps its own files or the results of jobs; choose another folder"
            problems.append(ConfigError(message, key=key, value=value))
    if problems:
        raise ConfigErrors(problems)


def _outside(name: str, key: str, roots: Sequence[Path]) -> ConfigErrors:
    places = ", ".join(map(str, roots))
    text = f"found {name!r}; from this page only what lies inside {places} can be used"
    return _refused(f"{text}; the operator may add folders in quantdeck.toml ([models] roots)", key, name)


def _refused(message: str, key: str, value: str) -> ConfigErrors:
    return ConfigErrors([ConfigError(message, key=key, value=value)])
