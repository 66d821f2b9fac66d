"""Finding a job's model and telling what it is, from config.json and the safetensors headers alone.

Imports no torch: pages and validation use it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from backend.demo import MODEL_DIR
from backend.errors import ConfigError, ConfigErrors
from backend.formats.config import read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.paths import Home
from backend.schema import DEMO, JobConfig
from backend.settings import Settings
from backend.sources.places import local_place

REPO_ID = re.compile(r"[A-Za-z0-9][\w.\-]{0,95}(/[A-Za-z0-9][\w.\-]{0,95})?", re.ASCII)
Kind = Literal["demo", "local", "hub"]
WANTED_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is downloaded of a model on the Hub: no pickles, no code."""


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
        confined: True for requests of the web page: only folders inside `Settings.model_roots` are taken.

    Raises:
        ConfigErrors: If a folder does not exist, or the name is neither a folder nor a possible Hub id.
    """
    key = "CUSTOM_MODEL_PATH" if config.CUSTOM_MODEL_PATH else "MODEL"
    name = config.CUSTOM_MODEL_PATH or config.MODEL
    if name == DEMO:
        return ModelSource(name, MODEL_DIR, "demo")
    if config.CUSTOM_MODEL_PATH or _looks_local(name, home):
        wanted = "a folder with config.json and safetensors files"
        folder = local_place(name, home, key=key, confined=confined, wanted=wanted)
        if not folder.is_dir():
            message = f"found {name!r}, but {folder} is no folder; give {wanted}"
            raise ConfigErrors([ConfigError(message, key=key, value=name)])
        return ModelSource(name, folder, "local")
    if not is_repo_id(name):
        message = f"found {name!r}, which is neither a folder nor a Hub id like 'organisation/name'; give one of them"
        raise ConfigErrors([ConfigError(message, key=key, value=name)])
    return ModelSource(name, None, "hub")


def is_repo_id(name: str) -> bool:
    """Whether a name can be that of a model or dataset on the Hub, and nothing else."""
    return REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def _looks_local(name: str, home: Home) -> bool:
    if name.startswith((".", "~", "/")):
        return True
    try:
        return (home.root / name).is_dir()
    except (OSError, ValueError):
        return False


def model_facts(folder: Path) -> ModelFacts:
    """What a local model is, without reading its weights.

    Raises:
        ModelError: If config.json is missing or broken.
        CheckpointError: If the weight files are missing, truncated, corrupt or pickles.
    """
    config = read_config_json(folder, remote_code=True)  # the job is asked whether it may run it; here nothing is
    return facts_of(config, read_headers(folder))


def facts_of(config: Mapping[str, Any], tensors: Sequence[TensorInfo]) -> ModelFacts:
    """The same from the content of config.json and the tensors of all headers, wherever they were read."""
    by_type: dict[str, int] = {}
    for tensor in tensors:
        by_type[tensor.dtype] = by_type.get(tensor.dtype, 0) + _count(tensor)
    return ModelFacts(
        architecture=str((config.get("architectures") or ["unknown"])[0]),
        layers=_whole(config.get("num_hidden_layers")),
        hidden_size=_whole(config.get("hidden_size")),
        intermediate_size=_whole(config.get("intermediate_size")),
        vocab_size=_whole(config.get("vocab_size")),
        parameters=sum(by_type.values()),
        weight_bytes=sum(t.nbytes for t in tensors),
        dtype=max(by_type, key=by_type.__getitem__, default="none"),
    )


def _whole(value: object) -> int:
    """A number of config.json; 0 where there is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _count(tensor: TensorInfo) -> int:
    return prod(tensor.shape)


def list_models(home: Home) -> list[ModelEntry]:
    """The demo model, and every folder with a config.json below the folders of models that the page may use."""
    entries = [ModelEntry(DEMO, MODEL_DIR, "demo", "built in, no download")]
    try:
        roots = Settings.load(home).model_roots(home)
    except ConfigError:  # said where jobs are checked
        roots = (home.user_data / "models",)
    for root in dict.fromkeys(roots):
        entries += _local_models(root, home)
    return entries


def _local_models(root: Path, home: Home) -> Iterator[ModelEntry]:
    for folder, subfolders, files in os.walk(root):
        path = Path(folder)
        depth = len(path.relative_to(root).parts)
        subfolders[:] = sorted(subfolders) if depth < 3 else []
        if "config.json" in files:
            name = path.relative_to(home.root) if path.is_relative_to(home.root) else path
            yield ModelEntry(str(name), path, "local", "local folder")
