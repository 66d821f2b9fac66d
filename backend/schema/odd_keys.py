"""Keys of a job file that the schema does not have: refused, or kept without effect."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backend.errors import ConfigError
from backend.schema.fields import sections
from backend.schema.job import JobConfig

_NOT_FOR_JOBS = re.compile(
    r"(LD|DYLD|PYTHON|HF|HUGGING_?FACE|TRANSFORMERS|TORCH|NVIDIA|QUANTDECK)_\w+|\w*_PROXY|(\w+_)?(ENDPOINT|BASE_URL)"
    r"|PYTHON(PATH|HOME|STARTUP)|CUDA_VISIBLE_DEVICES|PATH|HOME|SHELL|ENV|ENVIRONMENT|ENV_VARS|INCLUDE_PATH",
    re.IGNORECASE,
)
"""Keys that would change the environment of the programs that a job runs, or where they download from."""
_CODE_SWITCHES = re.compile(r"(TRUST|ALLOW)_REMOTE_CODE|CONFIRM_RUN_UNSAFE_CODE|ALLOW_PICKLE", re.IGNORECASE)
"""Keys that would let files from elsewhere run code, if they are switched on."""
_WITHOUT_EFFECT = re.compile(r"llm\.AQLM\.(calibration|conversion|finetune)_config\.trust_remote_code")
"""Such keys that the AQLM guide's file has; they are taken and change nothing."""


def refused_keys(values: Any, path: str = "") -> Iterator[ConfigError]:
    """Keys that a job file may not have: they ask for what only the operator of the machine decides."""
    if isinstance(values, list):
        for number, value in enumerate(values):
            yield from refused_keys(value, f"{path}.{number}")
    if not isinstance(values, Mapping):
        return
    for key, value in values.items():
        place = f"{path}.{key}".lstrip(".")
        if _NOT_FOR_JOBS.fullmatch(key):
            text = "a job file cannot set environment variables or addresses; the operator sets them where it starts"
            yield ConfigError(f"{text} Quantdeck", key=place, value=value)
        elif _WITHOUT_EFFECT.fullmatch(place):
            continue
        elif _CODE_SWITCHES.fullmatch(key) and place != "TRUST_REMOTE_CODE" and value not in (False, None, "", 0):
            text = "runs code that comes with a model only with TRUST_REMOTE_CODE: true at the top of the file"
            if "pickle" in key.lower():
                text = "takes pickle files only if quantdeck.toml allows it ([models] allow_pickle); take this key out"
            yield ConfigError(f"found {value!r}; Quantdeck {text}", key=place, value=value)
        else:
            yield from refused_keys(value, place)


@dataclass(frozen=True)
class Unknown:
    """A key that is kept but has no effect.

    Attributes:
        path: Where it stands.
        near: The key of the same section that was probably meant, or None.
    """

    path: tuple[str, ...]
    near: str | None

    def __str__(self) -> str:
        hint = f"; did you mean {self.near}?" if self.near else ""
        return f"{'.'.join(self.path)}: unknown key, kept in the file without effect{hint}"


def unknown_keys(values: Mapping[str, Any]) -> Iterator[Unknown]:
    """The unknown keys of a file, section by section; the sections of all algorithms are looked at."""
    for path, model in sections(JobConfig):
        known = list(model.model_fields)
        by_lower = {key.lower(): key for key in known}
        for key in section_at(values, path):
            if key not in known:
                near = difflib.get_close_matches(key.lower(), by_lower, n=1, cutoff=0.8)
                yield Unknown((*path, key), by_lower[near[0]] if near else None)


def section_at(values: Any, path: tuple[str, ...]) -> Mapping[str, Any]:
    """The section at a path; empty if there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}
