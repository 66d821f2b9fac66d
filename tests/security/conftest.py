"""Running dashboards, and a model folder to spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from backend import accounts
from backend.demo import MODEL_DIR
from backend.paths import Home
from tests.formats.models import make_model
from tests.security.folders import TOKENIZER_FILES
from tests.security.site import PASSWORD, PUBLIC, running


@pytest.fixture(scope="module")
def open_site(tmp_path_factory):
    """A dashboard without accounts."""
    with running(Home.at(tmp_path_factory.mktemp("open"))) as site:
        yield site


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A dashboard with two accounts, behind a public https origin."""
    home = Home.at(tmp_path_factory.mktemp("closed"))
    accounts.add(home, "ada", PASSWORD)
    accounts.add(home, "bob", PASSWORD)
    with running(home, origins=[PUBLIC], max_upload_bytes=100_000) as site:
        yield site


@pytest.fixture(scope="module")
def ada(site):
    with site.login() as client:
        yield client


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("models") / "model")
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that only a payload makes."""
    return tmp_path / "canary"
