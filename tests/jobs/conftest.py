"""Jobs with fake programs."""

import pytest

from backend.jobs import launch
from tests.jobs import fake_scheduler
from tests.jobs.harness import Jobs


@pytest.fixture
def jobs(home, monkeypatch):
    """The jobs of an empty home, whose programs are fakes; what a test leaves of ended jobs is looked at."""
    monkeypatch.setattr(launch, "RUNNER", fake_scheduler.RUNNER)
    monkeypatch.setattr(launch, "SCHEDULER", fake_scheduler.SCHEDULER)
    made = Jobs(home)
    try:
        yield made
        made.are_sound()
    finally:
        made.end()
