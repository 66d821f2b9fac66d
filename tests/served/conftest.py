from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.served.server import ModelServer, model_server


@pytest.fixture
def server() -> Iterator[ModelServer]:
    """A model server of this test's own."""
    with model_server() as running:
        yield running
