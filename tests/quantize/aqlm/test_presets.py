"""Settings of the search as plain data."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from backend.errors import ConfigError
from backend.paths import PROJECT
from backend.quantize.aqlm.presets import PRESETS, SearchSettings


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_settings_survive_json(name: str) -> None:
    settings = PRESETS[name]
    assert SearchSettings.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings


def test_missing_keys_have_defaults() -> None:
    assert SearchSettings.from_dict({"beam_size": 3}) == SearchSettings(beam_size=3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("procedure", "slow"),
        ("beam_size", 0),
        ("beam_size", 1.5),
        ("beam_size", True),
        ("max_epochs", -1),
        ("steps_per_epoch", 0),
        ("relative_mse_tolerance", 1.0),
        ("relative_mse_tolerance", -0.1),
        ("init_max_iter", 0),
        ("init_max_points_per_centroid", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("candidates", 3),
        ("candidates", 0),
        ("warm_ups", -1),
        ("warm_up_weights", 0),
        ("damp", 0.0),
        ("damp", 1.5),
    ],
)
def test_wrong_values_are_named(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as raised:
        SearchSettings(**{key: value})
    assert raised.value.key == key
    assert repr(value) in raised.value.message


def test_unknown_keys_are_named() -> None:
    with pytest.raises(ConfigError, match="warmups"):
        SearchSettings.from_dict({"warmups": 3})


def test_presets_need_no_torch() -> None:
    program = "import sys, backend.quantize.aqlm.presets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT, check=False).returncode == 0
