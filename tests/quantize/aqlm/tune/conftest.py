"""The model and its checkpoint are made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.quantize.aqlm.tune.tiny import quantized, trained


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("tuning") / "base")


@pytest.fixture(scope="session")
def start(base: Path) -> Path:
    return quantized(base, base.parent / "start")
