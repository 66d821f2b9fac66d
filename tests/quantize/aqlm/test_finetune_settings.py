from __future__ import annotations

import json
from typing import Any

import pytest

from backend.errors import ConfigError
from backend.quantize.aqlm.finetune_settings import FinetuneSettings


def test_as_json_and_back() -> None:
    settings = FinetuneSettings(max_epochs=25, lr=1e-4, beta2=0.999, batch_size=256, local_batch_size=4)
    assert FinetuneSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


@pytest.mark.parametrize(
    ("changes", "key", "told"),
    [
        ({"batch_size": 6, "local_batch_size": 4}, "finetune_batch_size", "which local_batch_size 4 does not divide"),
        ({"batch_size": 4, "local_batch_size": 8}, "finetune_batch_size", "which local_batch_size 8 does not divide"),
        ({"local_batch_size": 0}, "local_batch_size", "whole numbers from 1"),
        ({"batch_size": 0}, "finetune_batch_size", "whole numbers from 1"),
        ({"batch_size": 2.0}, "finetune_batch_size", "whole numbers from 1"),
        ({"max_epochs": -1}, "finetune_max_epochs", "whole numbers from 0"),
        ({"early_stop": 0}, "finetune_early_stop", "whole numbers from 1"),
        ({"lr": 0}, "finetune_lr", "numbers above 0"),
        ({"lr": float("inf")}, "finetune_lr", "numbers above 0"),
        ({"lr": "1e-4"}, "finetune_lr", "numbers above 0"),
        ({"lr": True}, "finetune_lr", "numbers above 0"),
        ({"beta1": 1.0}, "finetune_adam_beta1", "from 0 and below 1"),
        ({"beta2": -0.1}, "finetune_adam_beta2", "from 0 and below 1"),
    ],
)
def test_bad_values(changes: dict[str, Any], key: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        FinetuneSettings(**changes)
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("batch", "local", "length", "expected"),
    [(8, None, 512, 8), (8, None, 1024, 4), (6, None, 1024, 3), (7, None, 1024, 1), (8, None, 8192, 1), (256, 4, 1, 4)],
)
def test_local_batches_divide_the_batch(batch: int, local: int | None, length: int, expected: int) -> None:
    assert FinetuneSettings(batch_size=batch, local_batch_size=local).local_batch(length) == expected
