"""The text on which a quantized model is tuned, as token sequences: what is trained on, and what decides."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from backend.engines.aqlm_plan import tune_settings
from backend.errors import ConfigError, ConfigErrors
from backend.schema import AQLMSettings, JobConfig
from backend.sources.calibration import Encoder, token_sequences

DATA_KEY = "llm.AQLM.FINETUNE_DATA"
LARGEST_SHARE = 4  # a default validation takes at most one in so many sequences


def tuning_sequences(config: JobConfig, rows: Iterable[Any], encode: Encoder) -> list[list[int]]:
    """Cut the tuning text into sequences.

    Args:
        config: The job, whose algorithm is AQLM.
        rows: Of the text, one or several at a time.
        encode: Tokenizes a batch of rows.

    Returns:
        Sequences of `finetune_config.model_seqlen` tokens each, as many as were asked for or the text has.

    Raises:
        DataError: If there is not one, or (PACKING full) not enough.
    """
    size, calibration = tuning_size(config), config.calibration
    return token_sequences(
        rows,
        encode,
        samples=size.samples,
        length=size.length,
        shuffle=calibration.SHUFFLE,
        seed=calibration.SEED,
        packing=size.packing,
        text="tuning",
    )


@dataclass(frozen=True)
class TuningSize:
    """How much of the tuning text is read, and how its rows become sequences."""

    samples: int
    length: int
    packing: Literal["join", "full"]


def tuning_size(config: JobConfig) -> TuningSize:
    """What the job asks for: a number of its own, else that of calibration; rows are joined unless each must do."""
    settings, calibration = _settings(config), config.calibration
    samples = settings.FINETUNE_DATA.SAMPLES or calibration.SAMPLES
    packing: Literal["join", "full"] = "full" if calibration.PACKING == "full" else "join"
    return TuningSize(samples, settings.finetune_config.model_seqlen, packing)


def held_out(config: JobConfig, sequences: int) -> int:
    """How many of the last sequences decide which step's model is kept.

    Raises:
        ConfigErrors: If no training sequences are left, or fewer than make a batch.
    """
    settings = _settings(config)
    wanted = settings.FINETUNE_DATA.VAL_SAMPLES
    most = max(1, sequences // LARGEST_SHARE)
    held = wanted if wanted is not None else min(settings.calibration_config.val_size or most, most)
    if held >= sequences:
        message = (
            f"found {held}, and the tuning text makes {sequences} sequences of {settings.finetune_config.model_seqlen} "
            f"tokens; give more text or shorter sequences (finetune_config.model_seqlen), or set it to 1 to "
            f"{max(1, sequences - 1)}"
        )
        raise ConfigErrors([ConfigError(message, key=f"{DATA_KEY}.VAL_SAMPLES", value=held)])
    tune = tune_settings(settings)
    assert tune is not None  # else there is no tuning text
    try:
        tune.steps(sequences - held)
    except ConfigError as error:
        key = f"llm.AQLM.finetune_config.{error.key}"
        raise ConfigErrors([ConfigError(error.detail, key=key, value=error.value)]) from None
    return held


def check_block_type(model_dir: Path, wanted: str | None) -> None:
    """Refuse the name of a class that the model's decoder layers are not of, hours before tuning would.

    Raises:
        ConfigErrors: If it is another one.
    """
    if wanted is None:
        return
    import torch

    from backend.formats.skeleton import read_config
    from backend.quantize.architecture import describe

    architecture = describe(read_config(model_dir), torch.float32)
    found = type(architecture.layers[0]).__name__
    if found != wanted:
        message = (
            f"found {wanted!r}; the decoder layers of {architecture.name} are {found}; set that, or leave it empty"
        )
        raise ConfigErrors([ConfigError(message, key="llm.AQLM.finetune_config.block_type", value=wanted)])


def _settings(config: JobConfig) -> AQLMSettings:
    settings = config.algorithm_settings
    assert isinstance(settings, AQLMSettings)
    return settings
