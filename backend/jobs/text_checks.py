"""What the texts of a job make of themselves: read and tokenized before the start, where they are local.

Imports no torch, so chat templates are not written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from backend.errors import ConfigError, ConfigErrors, DataError
from backend.paths import Home
from backend.schema import AQLMSettings, JobConfig
from backend.sources.calibration import Encoder, token_sequences
from backend.sources.messages import (
    CalibrationRow,
    has_chat_template,
    needs_template,
    no_template_error,
    plain_text,
)
from backend.sources.plan import tuning_source
from backend.sources.texts import TextSource, check_rows, read_calibration_rows
from backend.sources.tokenizer_file import tokenizer_of
from backend.sources.tuning import DATA_KEY, held_out, tuning_sequences


def check_calibration(source: TextSource, config: JobConfig, model_dir: Path | None) -> int | None:
    """How many calibration sequences a local text makes; None if that cannot be told without the model's tokenizer.

    Raises:
        DataError: If there is no text, or too little.
        ModelError: If the tokenizer is broken.
    """
    settings = config.calibration

    def cut(rows: Iterable[CalibrationRow], encode: Encoder) -> list[list[int]]:
        return token_sequences(
            rows, encode, samples=settings.SAMPLES, length=settings.SEQUENCE_LENGTH, shuffle=settings.SHUFFLE,
            seed=settings.SEED, packing=settings.PACKING,
        )  # fmt: skip

    return _count(source, config, model_dir, cut, joins=settings.PACKING == "join", wanted=settings.SAMPLES)


def check_tuning(config: JobConfig, home: Home, model_dir: Path | None, confined: bool, notes: list[str]) -> None:
    """Refuse a tuning text that is not there, or too short for a batch; note how it is divided.

    Raises:
        ConfigErrors: With what is wrong, at the keys of FINETUNE_DATA, or of the job's own text.
    """
    try:
        source = tuning_source(config, home, confined=confined)
        if source is None or not source.is_local:
            return
        settings = config.algorithm_settings
        assert isinstance(settings, AQLMSettings)
        wanted = settings.FINETUNE_DATA.SAMPLES or config.calibration.SAMPLES
        cut = partial(tuning_sequences, config)
        joins = config.calibration.PACKING != "full"
        found = _count(source, config, model_dir, cut, joins=joins, wanted=wanted)
    except ConfigErrors as error:
        raise ConfigErrors([at_tuning(e, config) for e in error.errors]) from None
    except DataError as error:
        named, _, rest = error.message.partition(": ")
        plain = ConfigError(rest if named.isupper() else error.message, key=named if named.isupper() else "DATA_PATH")
        raise ConfigErrors([at_tuning(plain, config)]) from None
    if found is None:
        return
    held = held_out(config, found)
    length = settings.finetune_config.model_seqlen
    notes.append(f"Tuning reads {found - held} sequences of {length} tokens, {held} more decide which step is kept.")


def at_tuning(error: ConfigError, config: JobConfig) -> ConfigError:
    """A problem of the tuning text at its full key; of the job's own text it is told there already."""
    settings = config.algorithm_settings
    own = isinstance(settings, AQLMSettings) and settings.FINETUNE_DATA.is_own
    return ConfigError(error.detail, key=f"{DATA_KEY}.{error.key}" if own else error.key, value=error.value)


def _count(
    source: TextSource,
    config: JobConfig,
    model_dir: Path | None,
    cut: Callable[[Iterable[CalibrationRow], Encoder], list[list[int]]],
    *,
    joins: bool,
    wanted: int,
) -> int | None:
    """How many sequences a local text makes; None if that cannot be told without the model's tokenizer."""
    mode = config.calibration.CHAT_TEMPLATE
    tokenizer = tokenizer_of(model_dir) if model_dir else None
    if model_dir is None or tokenizer is None:
        check_rows(source)
        return None
    has_template = has_chat_template(model_dir)
    templated = False

    def encode(rows: Sequence[CalibrationRow]) -> list[list[int]]:
        # A template's own words are left out here, so conversations count for a little less than they will be.
        nonlocal templated
        asked = any(needs_template(row, mode) for row in rows)
        if asked and not has_template:
            raise no_template_error(source.label)
        templated = templated or asked
        texts = [row if isinstance(row, str) else plain_text(row) for row in rows]
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]

    try:
        sequences = cut(read_calibration_rows(source), encode)
    except UnicodeDecodeError as error:
        raise DataError(f"{source.label} is not UTF-8 text (byte {error.start})") from None
    except DataError:
        if templated and joins:
            return None  # the template's words may make up for what is missing
        raise
    return None if templated and joins and len(sequences) < wanted else len(sequences)
