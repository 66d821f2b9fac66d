"""A look at a text of a job before the job starts: its first rows as the model will see them.

The text is read by a program of its own (`preview_rows`) with limits of time, memory and rows. Imports no torch.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from backend.engines.environments import own_variables
from backend.errors import ConfigErrors, DataError, QuantdeckError
from backend.formats import remote_code
from backend.jobs.redact import redact
from backend.jobs.text_checks import at_tuning
from backend.paths import PROJECT, Home
from backend.process import PARENT_VARIABLE, QUIET_THREADS
from backend.schema import Document, JobConfig, new_document
from backend.sources import hub_token
from backend.sources.calibration import Purpose
from backend.sources.models import resolve_model
from backend.sources.plan import calibration_source, tuning_source
from backend.sources.texts import TextSource
from backend.sources.tuning import held_out, tuning_size

MOST_SHOWN = 50
SECONDS = 20.0  # for reading; the program's start and a template come on top
ONLINE_SECONDS = 45.0
MARGIN_SECONDS = 30.0
MEMORY_BYTES = 2 * 2**30  # of the reading program; its libraries take a few hundred MB of it

OWN_KEYS = (
    "MODEL", "CUSTOM_MODEL_PATH", "DATASET_NAME", "DATASET_SUBNAME", "TEXT_COLUMN", "SPLIT", "DATA_PATH",
    "FORMAT_STRING", "USER_FOLDER", "CACHE_PATH", "CALIBRATION",
)  # fmt: skip
"""What a preview reads of a job file: nothing else in it can be in its way."""
SIZES: dict[str, dict[str, tuple[str, ...]]] = {
    "AQLM": {
        "calibration_config": ("nsamples", "model_seqlen", "seed", "val_size"),
        "finetune_config": ("model_seqlen", "max_epochs", "batch_size", "microbatch_size"),
        "FINETUNE_DATA": (),
    },
    "TensorRTLLM": {"calib_size": (), "max_seq_length": ()},
}
"""Keys of algorithms' own sections that say which text is read, and how much."""

log = logging.getLogger("quantdeck.preview")


class NotDownloadedError(DataError):
    """The text is a dataset of the Hub that is not on this machine, and was not to be fetched."""


@dataclass(frozen=True)
class ShownRow:
    """A row as the model sees it.

    Attributes:
        number: In the order of reading, from 1.
        pieces: Its beginning in parts: text, and whether that is a special token.
        length: Of the whole row, in the preview's unit; 0 for an empty one, which a job skips.
        templated: Whether the model's chat template wrote it.
        cut: Whether more follows than is shown.
    """

    number: int
    pieces: tuple[tuple[str, bool], ...]
    length: int
    templated: bool
    cut: bool


@dataclass(frozen=True)
class Preview:
    """What was found.

    Attributes:
        label: The text in one line.
        unit: Of lengths: `tokens`, or `characters` where the model's tokenizer is not on this machine.
        rows: The first rows.
        lengths: Of every row that was read and is not empty.
        read: Rows that were read: about as many as the job will.
        empty: Empty ones among them.
        sequences: Calibration sequences that they make; None if that cannot be told.
        wanted: Sequences that the job asks for.
        length: Tokens per sequence.
        packing: How rows become sequences.
        complete: Whether the preview's own limits cut nothing off.
        warnings: What may be wrong, in sentences.
        notes: What one should know, in sentences.
    """

    label: str
    unit: str
    rows: tuple[ShownRow, ...]
    lengths: tuple[int, ...]
    read: int
    empty: int
    sequences: int | None
    wanted: int
    length: int
    packing: str
    complete: bool
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def summary(found: Preview) -> str:
    """How much text it is, in one sentence."""
    parts = [f"{found.read:,} rows of {found.label} were read"]
    if found.lengths:
        parts.append(
            f"{min(found.lengths):,} to {max(found.lengths):,} {found.unit} each, half of them at most "
            f"{median(found.lengths):,.0f}"
        )
    if found.sequences is not None:
        sizes = "at most " if found.packing == "sample" else ""
        parts.append(f"{found.sequences:,} of {found.wanted:,} sequences of {sizes}{found.length:,} tokens")
    return "; ".join(parts) + "."


def bins_of(lengths: Sequence[int], most: int) -> list[tuple[int, int, int]]:
    """Lengths counted in at most so many ranges of equal width: first, last, how many."""
    if not lengths:
        return []
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // most))
    counts = [0] * ((high - low) // width + 1)
    for length in lengths:
        counts[(length - low) // width] += 1
    return [(low + i * width, low + (i + 1) * width - 1, n) for i, n in enumerate(counts)]


def preview_config(document: Document, text: Purpose = "calibration") -> JobConfig:
    """The settings of a job file that a text depends on, whatever is wrong with the others.

    Args:
        document: The job file.
        text: Which one. For `tuning` the algorithm is AQLM, whatever the file says.

    Raises:
        ConfigErrors: If one of them is wrong.
    """
    values = {key: value for key, value in document.values.items() if key in OWN_KEYS}
    values = {"MODEL": "none", **values, "JOB_ID": "preview"}
    algorithm = "AQLM" if text == "tuning" else document.values.get("ALGORITHM")
    section = (document.values.get("llm") or {}).get(algorithm) if isinstance(algorithm, str) else None
    sized = {**values, "ALGORITHM": algorithm, "llm": {algorithm: _sizes(algorithm, section)}}
    if text == "tuning":
        return new_document(sized).config
    try:  # some algorithms have keys of their own for how much text is read
        return new_document(sized if algorithm in SIZES else {**values, "ALGORITHM": "Native"}).config
    except ConfigErrors:
        return new_document({**values, "ALGORITHM": "Native"}).config


def _sizes(algorithm: Any, section: Any) -> dict[str, Any]:
    """The part of an algorithm's section that says which text is read, and how much."""
    found: dict[str, Any] = {}
    for key, inner in SIZES.get(algorithm, {}).items() if isinstance(section, Mapping) else ():
        value = section.get(key)
        if isinstance(value, Mapping):
            found[key] = {k: v for k, v in value.items() if not inner or k in inner}
        elif value is not None:
            found[key] = value
    return found


def preview(
    config: JobConfig,
    home: Home,
    *,
    text: Purpose = "calibration",
    rows: int = 5,
    online: bool = False,
    confined: bool = False,
) -> Preview:
    """Look at the calibration text of a job, or at the text that AQLM tunes on.

    Args:
        config: The job, of which only the model, the text and how much of it is read count.
        home: Its home.
        text: Which one.
        rows: Rows to show, at most `MOST_SHOWN`.
        online: Whether the first rows of a Hub dataset may be fetched if it is not on this machine.
        confined: True for requests of the web page.

    Raises:
        ConfigErrors: If a path does not exist or may not be read.
        NotDownloadedError: If it is a Hub dataset that is not on this machine, unless `online`.
        DataError: If no row can be read, or the job reads none; the message says why.
    """
    source = _source(config, home, text, confined)
    size = tuning_size(config) if text == "tuning" else None
    cache = home.cache_dir(config) / "datasets"
    model_dir, note = _model_dir(config, home, confined)
    request = {
        "source": {**asdict(source), "path": str(source.path) if source.path else None},
        "model_dir": str(model_dir) if model_dir else None,
        "cache_dir": str(cache),
        "rows": max(1, min(rows, MOST_SHOWN)),
        "text": text,
        "samples": size.samples if size else config.calibration.SAMPLES,
        "length": size.length if size else config.calibration.SEQUENCE_LENGTH,
        "packing": size.packing if size else config.calibration.PACKING,
        "shuffle": config.calibration.SHUFFLE,
        "seed": config.calibration.SEED,
        "mode": config.calibration.CHAT_TEMPLATE,
        "seconds": SECONDS,
        "memory": MEMORY_BYTES,
        "online": False,
    }
    found = _read(source, request, cache, home, online=online)
    found = replace(found, notes=(*found.notes, note)) if note else found
    return _divided(config, found) if size and found.sequences else found


def _source(config: JobConfig, home: Home, text: Purpose, confined: bool) -> TextSource:
    if text == "calibration":
        return calibration_source(config, home, confined=confined)
    try:
        source = tuning_source(config, home, confined=confined)
    except ConfigErrors as error:
        raise ConfigErrors([at_tuning(one, config) for one in error.errors]) from None
    if source is None:
        raise DataError(
            "this job does not tune its model, so no tuning text is read; set finetune_config.max_epochs to 1 or more"
        )
    return source


def _divided(config: JobConfig, found: Preview) -> Preview:
    """A tuning text with how its sequences are divided, or why they cannot be."""
    try:
        held = held_out(config, found.sequences or 0)
    except ConfigErrors as error:
        return replace(found, warnings=(*found.warnings, *(one.message for one in error.errors)))
    told = f"{(found.sequences or 0) - held:,} sequences are learned from; the last {held:,} decide which step is kept."
    return replace(found, notes=(told, *found.notes))


def _read(source: TextSource, request: dict[str, Any], cache: Path, home: Home, *, online: bool) -> Preview:
    if source.is_local:
        return _ask(request)
    if cache.is_dir():
        with suppress(DataError):  # not among the downloads, or not this split of it
            return _ask(request)
    if not online:
        raise NotDownloadedError(f"{source.label} is not on this machine yet")
    return _ask({**request, "online": True, "seconds": ONLINE_SECONDS}, home)


def _model_dir(config: JobConfig, home: Home, confined: bool) -> tuple[Path | None, str]:
    """Where the model's tokenizer lies, if it does on this machine; else a note."""
    missing = "the model is downloaded when the job starts"
    try:
        model = resolve_model(config, home, confined=confined)
    except QuantdeckError as error:
        detail = error.errors[0].detail if isinstance(error, ConfigErrors) else error.message
        return None, f"Lengths are in characters, since the model's tokenizer cannot be read: {detail}."
    folder = model.path
    if folder is None:
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(model.id, "tokenizer.json", cache_dir=home.cache_dir(config) / "hub")
        folder = Path(cached).parent if isinstance(cached, str) else None
    if folder is not None and (folder / "tokenizer.json").is_file():
        return folder, ""
    reason = "it has no tokenizer.json" if folder else missing
    return folder, f"Lengths are in characters, not tokens: {reason}."


def _ask(request: dict[str, Any], home: Home | None = None) -> Preview:
    """Run the reading program, for a limited time.

    Args:
        request: As `preview_rows` takes it.
        home: Whose token for the Hub it may use; None if it may not ask the Hub.

    Raises:
        DataError: With what it says is wrong, or how it ended.
    """
    command = [sys.executable, "-m", "backend.sources.preview_rows"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=PROJECT,
        env=_environment(home), start_new_session=True,
    )  # fmt: skip
    limit = request["seconds"] + MARGIN_SECONDS
    try:
        answer, errors = process.communicate(json.dumps(request).encode(), timeout=limit)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        raise DataError(f"the text could not be read within {limit:.0f} s; a job has no such limit") from None
    try:
        found = json.loads(answer)
    except ValueError:
        said = redact(errors.decode(errors="replace")[-2000:])
        log.warning("a preview ended with %s: %s", process.returncode, said)
        raise DataError(
            f"the program that reads the text ended with code {process.returncode}; the text may be damaged, or need "
            "more memory than a preview may use"
        ) from None
    if "error" in found:
        raise DataError(redact(found["error"]))
    shown = tuple(
        ShownRow(**{**row, "pieces": tuple((text, special) for text, special in row["pieces"])})
        for row in found["rows"]
    )
    return Preview(**{**found, "rows": shown, **{k: tuple(found[k]) for k in ("lengths", "warnings", "notes")}})


def _environment(home: Home | None) -> dict[str, str]:
    """What the program sees of our environment; the token for the Hub only where it may go there."""
    online = home is not None
    return {
        **remote_code.environment(own_variables(hub_token=online), None),
        **(hub_token.variables(hub_token.token_file(home)) if home is not None else {}),
        **QUIET_THREADS,
        **({} if online else {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}),
        PARENT_VARIABLE: str(os.getpid()),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
