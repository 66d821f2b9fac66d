"""What a job's settings lose on their way to another program, and what that program has to be told besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from backend.jobs.export import export_text
from backend.schema import DEMO, JobConfig, parse_yaml
from backend.schema.texts import GSM8K_PRESET

OTHERS = ("nyuntam", "llmcompressor")
"""Targets of `export_text` that are files of other programs."""


@dataclass(frozen=True)
class Exported:
    """A file for another program.

    Attributes:
        text: The file.
        left_out: Dotted keys of the job file that it does not have; a section of which nothing stays by its own name.
        changed: Dotted keys that have another value in it, or are new, each with that value.
        notes: Sentences on what else the other program needs, or does otherwise.
    """

    text: str
    left_out: tuple[str, ...]
    changed: tuple[tuple[str, Any], ...]
    notes: tuple[str, ...]


def exported(config_yaml: str, target: str) -> Exported:
    """A job file for one of `OTHERS`, with what is lost.

    Raises:
        ConfigErrors: If the file is not valid.
        ConfigError: If the program cannot do what the job does; with the key that stands in the way.
    """
    text = export_text(config_yaml, target)
    document = parse_yaml(config_yaml)
    if target == "llmcompressor":
        return Exported(text, (), (), tuple(_recipe_notes(document.config)))
    before, after = document.values, parse_yaml(text).values
    changed = tuple((key, value) for key, value in _leaves(after) if _at(before, key) != value)
    return Exported(text, tuple(_missing(before, after)), changed, tuple(_nyuntam_notes(document.config)))


def _missing(before: Mapping[str, Any], after: Any, prefix: str = "") -> Iterator[str]:
    for key, value in before.items():
        if not isinstance(after, Mapping) or key not in after:
            yield f"{prefix}{key}"
        elif isinstance(value, Mapping):
            yield from _missing(value, after[key], f"{prefix}{key}.")


def _leaves(values: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, key))
        else:
            yield ".".join((*path, key)), value


def _at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return values


def _nyuntam_notes(config: JobConfig) -> Iterator[str]:
    if config.is_demo:
        yield f"MODEL {DEMO} is only here: name a model of the Hub, or give CUSTOM_MODEL_PATH."
    if config.DATA_PATH is None and config.DATASET_NAME == DEMO:
        yield f"DATASET_NAME {DEMO} is only here: name a dataset of the Hub, or give DATA_PATH."
    if config.DATA_PATH is None and config.DATASET_NAME == GSM8K_PRESET:
        yield f"DATASET_NAME {GSM8K_PRESET} has to be made first, by its create_dataset.py, and named as DATA_PATH."
    if config.DATA_PATH is not None and config.DATA_PATH.rpartition(".")[2] in ("jsonl", "csv", "parquet", "txt"):
        yield "DATA_PATH is a file: it reads only folders that datasets saved, and downloads DATASET_NAME unasked."


def _recipe_notes(config: JobConfig) -> Iterator[str]:
    size = config.calibration
    text = config.DATA_PATH or "/".join(filter(None, (config.DATASET_NAME, config.DATASET_SUBNAME)))
    yield (
        f"A recipe has only the method. Tell oneshot the model ({config.CUSTOM_MODEL_PATH or config.MODEL}), the text "
        f"({text}), num_calibration_samples={size.SAMPLES} and max_seq_length={size.SEQUENCE_LENGTH}."
    )
