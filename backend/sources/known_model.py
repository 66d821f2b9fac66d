"""What is known of a job's model before it starts: from its files here, from a cache, or from what the Hub told.

Asks nobody over the network: what the Hub told was asked by whoever chose the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from backend.errors import CheckpointError, ModelError
from backend.formats.config import read_config_json
from backend.formats.headers import has_only_pickles
from backend.paths import Home
from backend.schema import JobConfig
from backend.sources import hub, hub_cache
from backend.sources.models import ModelSource
from backend.sources.quick_check import QuickFacts, quick_check

CONVERTED = "The weights are stored as pickle: the job converts them first, and checks them then."


@dataclass(frozen=True)
class KnownModel:
    """A job's model as far as it is known.

    Attributes:
        facts: What checks and forecasts ask of it; None if that is only known after the download or a conversion.
        folder: Its folder here, for its tokenizer and its files; None if it is not here.
        basis: Where the facts come from, in words; empty for a folder that the job file names.
        download_bytes: What has to be downloaded; 0 if nothing, None if that is not known.
        note: What is worth telling before the start; empty if nothing.
    """

    facts: QuickFacts | None
    folder: Path | None
    basis: str = ""
    download_bytes: int | None = 0
    note: str = ""


def known_model(source: ModelSource, config: JobConfig, home: Home, *, allow_pickle: bool = False) -> KnownModel:
    """Look at what is here of a model, or was told of it.

    Args:
        source: The model.
        config: Its job.
        home: Whose caches are looked at.
        allow_pickle: Whether the operator lets jobs convert pickles.

    Raises:
        ModelError: If it cannot be quantized.
        CheckpointError: If files in a folder that the job file names are broken.
    """
    trusted = config.TRUST_REMOTE_CODE
    if source.path is not None:
        if allow_pickle and has_only_pickles(source.path):
            read_config_json(source.path, remote_code=trusted)
            return KnownModel(None, source.path, note=CONVERTED)
        return KnownModel(quick_check(source.path, remote_code=trusted), source.path)
    unknown = f"{source.id} is downloaded when the job starts; its files are checked then."
    here = _cached(source.id, config, home)
    if (told := hub.peek(home, source.id, config.REVISION)) is not None:
        folder = here if here is not None and here.name == told.commit else None
        basis = f"from the headers at commit {told.commit[:12]}, nothing downloaded"
        download = 0 if folder is not None else told.download_bytes
        if told.pickle and allow_pickle:
            return KnownModel(None, folder, basis, None, CONVERTED)
        if told.model.refused and not (trusted and told.quick is not None):
            raise ModelError(told.model.refused)
        if told.quick is None or told.model.refused:  # its own code is looked at beside its config.json
            return KnownModel(None, folder, "", download, unknown)
        if folder is not None:
            basis = f"from its copy in the cache, commit {told.commit[:12]}; nothing is downloaded again"
        return KnownModel(told.quick, folder, basis, download)
    if here is not None:
        try:
            facts = quick_check(here, remote_code=trusted)
        except CheckpointError:  # cut or changed since; the job fetches it again
            return KnownModel(None, None, "", None, unknown)
        newer = "" if config.REVISION else "; the job takes a newer commit if the Hub has one"
        return KnownModel(facts, here, f"from its copy in the cache, commit {here.name[:12]}{newer}", 0)
    return KnownModel(None, None, "", None, unknown)


def _cached(repo_id: str, config: JobConfig, home: Home) -> Path | None:
    """The whole copy that the job would use without a network: of its own cache, else of huggingface_hub's."""
    folders = (home.cache_dir(config) / "hub", *hub_cache.cache_folders(home))
    return next(filter(None, (hub_cache.snapshot(folder, repo_id, config.REVISION) for folder in folders)), None)
