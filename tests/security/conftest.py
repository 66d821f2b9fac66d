"""Running dashboards for a module's tests."""

from __future__ import annotations

import pytest

from backend import accounts
from backend.paths import Home
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
