"""What a job file means in concrete terms: which text, which tasks. `auto` and empty values are decided here."""

from __future__ import annotations

import os
import string
from dataclasses import replace
from pathlib import Path

from backend.demo import TASK_NAME
from backend.errors import ConfigError, ConfigErrors
from backend.paths import Home
from backend.schema import DEMO, AQLMSettings, FinetuneData, JobConfig, TaskSettings
from backend.schema.measurement import AUTO
from backend.sources.models import is_repo_id
from backend.sources.places import local_place
from backend.sources.texts import FILE_KINDS, TextSource

GUIDE_TEXT = ("wikitext", "wikitext-2-raw-v1")
GUIDE_TASK = TaskSettings(NAME="arc_challenge", NUM_FEWSHOT=25)
READERS = frozenset((
    "arrow", "audiofolder", "cache", "conll", "csv", "eval", "fasta", "fastq", "genbank", "harbor", "hdf5", "iceberg",
    "imagefolder", "json", "lance", "meshfolder", "mmcif", "niftifolder", "pandas", "parquet", "pdb", "pdffolder",
    "spark", "sql", "text", "tsfile", "videofolder", "vortex", "webdataset", "xml",
))  # fmt: skip
"""Names that `datasets` takes for its own file readers, which read whatever lies in the working folder."""


_GSM8K = "Question: {question}\nAnswer: {answer}"
PRESETS = {"gsm8k_restructured": TextSource("openai/gsm8k", "main", "", ("question", "answer"), _GSM8K)}
"""Names of datasets that are made of another one by a format string -> that one, without its split."""


def calibration_source(config: JobConfig, home: Home, *, confined: bool = False) -> TextSource:
    """The calibration text.

    Args:
        config: The job.
        home: A relative DATA_PATH starts here.
        confined: True for requests of the web page: DATA_PATH must lie inside `Settings.model_roots`.

    Raises:
        ConfigErrors: If DATA_PATH does not exist. There is no silent fall-back to a download.
    """
    return _source(config, home, confined)


def tuning_source(config: JobConfig, home: Home, *, confined: bool = False) -> TextSource | None:
    """The text that the whole model is tuned on: its own, else the calibration text; None if the job tunes nothing.

    Args:
        config: The job.
        home: A relative DATA_PATH starts here.
        confined: As for `calibration_source`.

    Raises:
        ConfigErrors: If its DATA_PATH does not exist; keys are those of FINETUNE_DATA.
    """
    settings = config.algorithm_settings
    if not isinstance(settings, AQLMSettings) or not settings.tunes:
        return None
    data = settings.FINETUNE_DATA
    if not data.is_own:
        return calibration_source(config, home, confined=confined)
    if data.PRESET is not None and data.DATA_PATH is None:
        saved = home.root / config.USER_FOLDER / "datasets" / data.PRESET
        if saved.is_dir():
            return TextSource(data.PRESET, None, data.SPLIT, ("text",), None, saved)
        return replace(PRESETS[data.PRESET], split=data.SPLIT)
    return _source(data, home, confined)


def _source(section: JobConfig | FinetuneData, home: Home, confined: bool) -> TextSource:
    """The text that DATASET_NAME or DATA_PATH of a section and the keys beside them name."""
    path: Path | None = None
    name = section.DATASET_NAME
    if section.DATA_PATH:
        wanted = f"a {', '.join(FILE_KINDS)} file or a saved dataset, or leave it empty to use DATASET_NAME"
        path = local_place(section.DATA_PATH, home, key="DATA_PATH", confined=confined, wanted=wanted)
    elif name in PRESETS:
        return replace(PRESETS[name], split=section.SPLIT)
    else:
        _check_dataset(name, "DATASET_NAME")
    _check_template(section.FORMAT_STRING)
    columns = tuple(section.text_columns)
    return TextSource(name, section.DATASET_SUBNAME, section.SPLIT, columns, section.FORMAT_STRING, path)


def _check_dataset(name: str | None, key: str) -> None:
    """Refuse a dataset name that `datasets` would take for a path, an address or a reader of local files."""
    if name is None or name == DEMO:
        return
    if not is_repo_id(name):
        message = f"found {name!r}, which is no dataset id on the Hub like 'organisation/name'; give files by DATA_PATH"
        raise ConfigErrors([ConfigError(message, key=key, value=name)])
    if name in READERS or os.path.lexists(name):
        message = f"found {name!r}, which names local files and no dataset on the Hub; give files by DATA_PATH"
        raise ConfigErrors([ConfigError(message, key=key, value=name)])


def _check_template(template: str | None) -> None:
    """Refuse widths and conversions in the format string: one row could be made as long as the memory."""
    for _, name, spec, conversion in string.Formatter().parse(template or ""):
        if spec or conversion:
            message = f"found {{{name}}} with a width or a conversion; write only {{{name}}}"
            raise ConfigErrors([ConfigError(message, key="FORMAT_STRING", value=template)])


def evaluation_source(config: JobConfig) -> TextSource:
    """The text on which perplexity is measured: the one named, else the demo's or the guides' own."""
    settings = config.EVALUATION
    if settings.DATASET_NAME != AUTO:
        _check_dataset(settings.DATASET_NAME, "EVALUATION.DATASET_NAME")
        return TextSource(settings.DATASET_NAME, settings.DATASET_SUBNAME, settings.SPLIT, (settings.TEXT_COLUMN,))
    if config.is_demo:
        return TextSource(DEMO, None, "test", ("text",))
    return TextSource(*GUIDE_TEXT, "test", ("text",))


def evaluation_tasks(config: JobConfig) -> list[TaskSettings]:
    """The accuracy tasks: those named, else the demo task for the demo model, the guide's for any other."""
    if config.EVALUATION.TASKS is not None:
        return list(config.EVALUATION.TASKS)
    return [TaskSettings(NAME=TASK_NAME)] if config.is_demo else [GUIDE_TASK]
