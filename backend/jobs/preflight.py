"""Everything about a job that can be known before it starts, checked without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines.registry import engine_for
from backend.errors import ConfigError, ConfigErrors, DataError, QuantdeckError
from backend.evaluate.tasks import check_tasks
from backend.formats.config import read_config_json
from backend.formats.size import predicted_size
from backend.jobs.devices import choose_device
from backend.paths import Home
from backend.schema import JobConfig
from backend.sources.calibration import token_sequences
from backend.sources.models import ModelSource, resolve_model
from backend.sources.plan import calibration_source, evaluation_source, evaluation_tasks
from backend.sources.quick_check import quick_check
from backend.sources.texts import TextSource, check_rows, read_rows


@dataclass(frozen=True)
class Checked:
    """What the checks found out.

    Attributes:
        device: Where the job will run, `cpu` or `cuda:N`.
        model: The model; its `path` is None if it has to be downloaded.
        predicted_bytes: Size of the quantized weight files, None if the model is not here yet.
        notes: Facts worth telling before the start.
    """

    device: str
    model: ModelSource
    predicted_bytes: int | None
    notes: tuple[str, ...]


def check_job(config: JobConfig, home: Home, *, confined: bool = False) -> Checked:
    """Check a job against the model, the text and the machine that are really there.

    Raises:
        ConfigErrors: With every problem found, each at its key.
    """
    problems: list[ConfigError] = []
    notes: list[str] = []

    def attempt(key: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ConfigErrors as error:
            problems.extend(error.errors)
        except ConfigError as error:
            problems.append(error)
        except QuantdeckError as error:
            named, _, rest = error.message.partition(": ")
            here = named if named.isupper() else key
            problems.append(ConfigError(rest if named.isupper() else error.message, key=here))
        return None

    device = attempt("CUDA_ID", lambda: choose_device(config.CUDA_ID))
    if device == "cpu":
        notes.append("No GPU was found: this job runs on the CPU.")
    attempt("ALGORITHM", lambda: engine_for(config.ALGORITHM))
    model = attempt("MODEL", lambda: resolve_model(config, home, confined=confined))
    model_key = "CUSTOM_MODEL_PATH" if config.CUSTOM_MODEL_PATH else "MODEL"
    predicted = None
    if model is not None and model.path is not None:
        predicted = attempt(model_key, lambda: _check_model(model.path, config))
    elif model is not None:
        notes.append(f"{model.id} is downloaded when the job starts; its files are checked then.")
    text = attempt("DATA_PATH", lambda: calibration_source(config, home, confined=confined))
    if text is not None and text.is_local:
        key = "DATA_PATH" if text.path else "DATASET_NAME"
        folder = model.path if model else None
        samples = attempt(key, lambda: _check_calibration(text, config, folder))
        if samples is not None and samples < config.CALIBRATION.SAMPLES:
            notes.append(
                f"The calibration text makes {samples} sequences of {config.CALIBRATION.SEQUENCE_LENGTH} tokens; "
                f"{config.CALIBRATION.SAMPLES} were asked for."
            )
    if config.EVALUATION.ENABLED:
        attempt("EVALUATION.TASKS", lambda: check_tasks([t.NAME for t in evaluation_tasks(config)]))
        evaluation = evaluation_source(config)
        if config.EVALUATION.PROTOCOLS and evaluation.is_local:
            attempt("EVALUATION.DATASET_NAME", lambda: check_rows(evaluation))
    if problems:
        raise ConfigErrors(problems)
    return Checked(device, model, predicted, tuple(notes))


@dataclass(frozen=True)
class _SizeSettings:
    """What decides the artefact's size."""

    group_size: int
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)


def _check_model(folder: Path, config: JobConfig) -> int:
    """The predicted size of the artefact of a model that passed all checks."""
    settings = config.algorithm_settings
    sizes = _SizeSettings(settings.Q_GROUP_SIZE)
    try:
        headers = quick_check(folder, sizes.group_size, sizes.modules_to_not_convert)
    except ConfigError as error:
        raise ConfigError(error.detail, key=f"llm.{config.ALGORITHM}.{error.key}", value=error.value) from None
    return predicted_size(headers, read_config_json(folder), sizes, version=settings.VERSION, dtype=settings.dtype)


def _check_calibration(source: TextSource, config: JobConfig, model_dir: Path | None) -> int | None:
    """How many calibration sequences a local text makes; None if that needs the tokenizer of a model not here yet."""
    tokenizer_file = model_dir / "tokenizer.json" if model_dir else None
    if tokenizer_file is None or not tokenizer_file.is_file():
        check_rows(source)
        return None
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(tokenizer_file))

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]

    try:
        settings = config.CALIBRATION
        sequences = token_sequences(
            read_rows(source), encode, samples=settings.SAMPLES, length=settings.SEQUENCE_LENGTH,
            shuffle=settings.SHUFFLE, seed=settings.SEED,
        )  # fmt: skip
    except UnicodeDecodeError as error:
        raise DataError(f"{source.label} is not UTF-8 text (byte {error.start})") from None
    return len(sequences)
