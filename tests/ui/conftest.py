"""What the browser tests of the pages share: a dashboard for a module, a page that is watched."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from backend.jobs import launch
from backend.paths import Home
from tests.dashboard import dashboard, watched_page


@pytest.fixture
def no_scheduler(monkeypatch):
    """For tests that look at jobs: nothing may start them."""
    monkeypatch.setattr(launch, "ensure_scheduler", lambda home: False)


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> Iterator[str]:
    """A dashboard of its own on a free port, with an empty home."""
    with dashboard(Home(tmp_path_factory.mktemp("home"))) as url:
        yield url


@pytest.fixture
def watched(address):
    """A page, and what it complained of or asked of other hosts."""
    with watched_page(address, color_scheme="light") as found:
        yield found
