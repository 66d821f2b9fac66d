"""Small file helpers: requests, JSON written whole or not at all, content digests."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backend.errors import ConfigError


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file so that readers see the old content or the new, never a part.

    Raises:
        ValueError: If the value holds NaN or infinity, which JSON has no spelling for.
    """
    text = json.dumps(value, allow_nan=False, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def give_usual_rights(path: Path) -> None:
    """Give a file the rights that files of this process usually get; safetensors makes its own for the owner alone."""
    mask = os.umask(0)  # there is no other way to ask for it
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def read_request(path: Path) -> dict[str, Any]:
    """Read the JSON object that tells a worker what to do.

    Raises:
        ConfigError: If the file is not there or does not hold a JSON object.
    """
    try:
        request = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"The request file {path} cannot be read as JSON: {error}") from error
    if not isinstance(request, dict):
        raise ConfigError(f"The request file {path} holds a {type(request).__name__}; a JSON object is needed.")
    return request


def required(request: Mapping[str, Any], key: str) -> Any:
    """A key that a request must have.

    Raises:
        ConfigError: If it is missing.
    """
    if key not in request:
        raise ConfigError(f"The request lacks the key {key!r}; it has {sorted(request)}.", key=key)
    return request[key]


def sync_path(path: Path) -> None:
    """Have a file's content, or a folder's list of names, reach the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
