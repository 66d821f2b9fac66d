"""Finding a job's model and telling what it is, from config.json and the safetensors headers alone.

Imports no torch: pages and validation use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

from backend.demo import MODEL_DIR
from backend.errors import ConfigError, ConfigErrors
from backend.formats.config import read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.paths import Home
from backend.schema import DEMO, JobConfig

REPO_ID = re.compile(r"^[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?$")
Kind = Literal["demo", "local", "hub"]


@dataclass(frozen=True)
class ModelSource:
    """A model as the job file names it.

    Attributes:
        id: What the file says.
        path: Folder with its files; None for a Hub model that is not downloaded yet.
        kind: Where it comes from.
    """

    id: str
    path: Path | None
    kind: Kind


@dataclass(frozen=True)
class ModelEntry:
    """A model that the picker offers.

    Attributes:
        id: Value for `MODEL`.
        path: Its folder.
        kind: Where it comes from.
        note: A few words for people.
    """

    id: str
    path: Path
    kind: Kind
    note: str


@dataclass(frozen=True)
class ModelFacts:
    """What a model is.

    Attributes:
        architecture: Name of the transformers class, e.g. `LlamaForCausalLM`.
        parameters: Number of stored weights; a tied head counts once.
        weight_bytes: Bytes of all tensors.
        dtype: Type of most of the weights, e.g. `BF16`.
    """

    architecture: str
    layers: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    parameters: int
    weight_bytes: int
    dtype: str


def resolve_model(config: JobConfig, home: Home, *, confined: bool = False) -> ModelSource:
    """Find the model that a job file names.

    `CUSTOM_MODEL_PATH` wins over `MODEL`. A path (absolute, or starting with `.` or `~`, or an existing folder
    below the home) is a local model; any other name is a Hub id.

    Args:
        config: The job.
        home: Relative paths start here.
        confined: True for requests of the web page: only folders below the home are taken.

    Raises:
        ConfigErrors: If a folder does not exist, or the name is neither a folder nor a possible Hub id.
    """
    key = "CUSTOM_MODEL_PATH" if config.CUSTOM_MODEL_PATH else "MODEL"
    name = config.CUSTOM_MODEL_PATH or config.MODEL
    if name == DEMO:
        return ModelSource(name, MODEL_DIR, "demo")
    folder = home.root / Path(name).expanduser()
    looks_local = bool(config.CUSTOM_MODEL_PATH) or name.startswith((".", "~", "/")) or folder.is_dir()
    if looks_local:
        if confined and not folder.resolve().is_relative_to(home.root):
            message = f"found {name!r}; from this page only folders inside {home.root} can be used"
            raise ConfigErrors([ConfigError(message, key=key, value=name)])
        if not folder.is_dir():
            message = (
                f"found {name!r}, but there is no folder {folder}; give a folder with config.json and safetensors files"
            )
            raise ConfigErrors([ConfigError(message, key=key, value=name)])
        return ModelSource(name, folder.resolve(), "local")
    if not REPO_ID.match(name) or ".." in name or "--" in name:
        message = f"found {name!r}, which is neither a folder nor a Hub id like 'organisation/name'"
        raise ConfigErrors([ConfigError(message, key=key, value=name)])
    return ModelSource(name, None, "hub")


def model_facts(folder: Path) -> ModelFacts:
    """What a local model is, without reading its weights.

    Raises:
        ModelError: If config.json is missing or broken.
        CheckpointError: If the weight files are missing, truncated, corrupt or pickles.
    """
    config = read_config_json(folder)
    tensors = read_headers(folder)
    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + _count(tensor)
    return ModelFacts(
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        layers=int(config.get("num_hidden_layers") or 0),
        hidden_size=int(config.get("hidden_size") or 0),
        intermediate_size=int(config.get("intermediate_size") or 0),
        vocab_size=int(config.get("vocab_size") or 0),
        parameters=sum(by_type.values()),
        weight_bytes=sum(t.nbytes for t in tensors),
        dtype=max(by_type, key=by_type.__getitem__, default="none"),
    )


def _count(tensor: TensorInfo) -> int:
    return prod(tensor.shape)


def list_models(home: Home) -> list[ModelEntry]:
    """The demo model, and every folder below `<home>/models` that holds a config.json."""
    demo = ModelEntry(DEMO, MODEL_DIR, "demo", "built in, no download")
    return [demo, *_local_models(home)]


def _local_models(home: Home) -> Iterator[ModelEntry]:
    root = home.user_data / "models"
    for folder, subfolders, files in os.walk(root):
        depth = len(Path(folder).relative_to(root).parts)
        subfolders[:] = sorted(subfolders) if depth < 3 else []
        if "config.json" in files:
            yield ModelEntry(str(Path(folder).relative_to(home.root)), Path(folder), "local", "local folder")
