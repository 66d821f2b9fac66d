"""The real scheduler with `tests.jobs.fake_runner` as its runner: `python -m tests.jobs.fake_scheduler HOME`."""

from backend.jobs import launch, scheduler

RUNNER, SCHEDULER = "tests.jobs.fake_runner", "tests.jobs.fake_scheduler"


def use_fakes():
    """Have this process start the fakes, and have them start each other."""
    launch.RUNNER, launch.SCHEDULER = RUNNER, SCHEDULER


if __name__ == "__main__":
    use_fakes()
    scheduler.main()
