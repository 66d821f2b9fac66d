"""Jobs with fake programs, to be hurt."""

from tests.jobs.conftest import jobs

__all__ = ["jobs"]
