"""What a tuning may be told, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from backend.errors import ConfigError
from backend.quantize.aqlm.tune.settings import TuneSettings

GUIDE = {  # finetune_config of the guide, what it decides about the result
    "adam_beta1": 0.9, "adam_beta2": 0.95, "amp_dtype": "float32", "amsgrad": False, "batch_size": 128, "beam_size": 1,
    "block_type": "LlamaDecoderLayer", "code_adam_16bit": False, "code_beta1": 0.0, "code_beta2": 0.95,
    "code_lr": 0.001, "code_trust_ratio": 0.01, "debias": True, "delta_decay": 0, "eval_every_steps": 15,
    "force_code_update": False, "gradient_checkpointing": True, "lamb": True, "lr": 0.0001, "master_dtype": "float32",
    "max_code_change_per_step": 0.01, "max_epochs": 10, "microbatch_size": 2, "minimize_sync": False,
    "save_every_steps": 10, "seed": 1337, "straight_through_buffer_dtype": "float32",
    "update_codebooks_and_scales": True, "update_codes": True, "update_non_quantized_parameters": True,
}  # fmt: skip


def test_the_guides_values_are_valid_and_survive() -> None:
    settings = TuneSettings(**GUIDE)
    assert TuneSettings.from_dict(settings.to_dict()) == settings
    assert settings.microbatch(4, 4096) == 2
    assert settings.steps(1792) == 140


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_epochs", 0), ("max_epochs", 1.5), ("max_epochs", True), ("batch_size", 0), ("lr", 0), ("lr", "1e-4"),
        ("code_lr", -1e-3), ("adam_beta2", 1.0), ("code_beta1", -0.1), ("max_code_change_per_step", 0),
        ("max_code_change_per_step", 1.01), ("code_trust_ratio", 0), ("delta_decay", 1.5), ("beam_size", 0),
        ("lr_schedule", "linear"), ("master_dtype", "int8"), ("amp_dtype", "auto"), ("early_stop", 0),
        ("microbatch_size", 0), ("seed", -1), ("p_only_epochs", -1),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="allowed are") as error:
        TuneSettings(**{key: value})
    assert (error.value.key, error.value.value) == (key, value)


@pytest.mark.parametrize(("key", "value"), [("max_code_change_per_step", 1), ("delta_decay", 1), ("code_lr", 1)])
def test_bounds_that_belong_to_the_range(key: str, value: Any) -> None:
    assert getattr(TuneSettings(**{key: value}), key) == value


def test_nothing_to_update() -> None:
    with pytest.raises(ConfigError, match="update_codes: .*update_codebooks_and_scales.*set one of them"):
        TuneSettings(update_codes=False, update_codebooks_and_scales=False, update_non_quantized_parameters=False)


@pytest.mark.parametrize(
    ("batch", "micro", "processes", "needed"), [(10, 4, 1, 4), (12, 4, 2, 8), (9, None, 2, 2), (6, 6, 2, 12)]
)
def test_batches_that_cannot_be_shared_out(batch: int, micro: int | None, processes: int, needed: int) -> None:
    with pytest.raises(ConfigError, match=f"batch_size: found {batch}.* multiple of {needed}$"):
        TuneSettings(batch_size=batch, microbatch_size=micro).microbatch(processes, 128)


@pytest.mark.parametrize(
    ("batch", "processes", "length", "expected"),
    [(16, 1, 256, 16), (16, 2, 256, 8), (128, 1, 4096, 1), (96, 1, 100, 32), (7, 1, 1000, 1), (6, 1, 2048, 2)],
)
def test_microbatches_of_about_4096_tokens(batch: int, processes: int, length: int, expected: int) -> None:
    assert TuneSettings(batch_size=batch).microbatch(processes, length) == expected


def test_steps() -> None:
    assert TuneSettings(batch_size=4, max_epochs=3).steps(10) == 7
    with pytest.raises(ConfigError, match="batch_size: found 16, but there are 10 training sequences"):
        TuneSettings().steps(10)
