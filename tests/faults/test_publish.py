"""A runner killed at every step of publication (fault 7): the model is there once and whole."""

import signal

import pytest

from backend.jobs import launch
from backend.jobs.publish import check_manifest
from backend.process import hold_lock
from tests.jobs.harness import weights

STEPS = (
    "publish.begin", "publish.manifest", "publish.synced", "publish.ready", "publish.renamed", "publish.done",
    "stage.publish", "stage.report", "finish.result",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_a_runner_killed_while_it_saves_has_saved_once_or_not_at_all(jobs, step):
    job = jobs.create({"name": "w4"}, {"name": "w3"})
    folder = jobs.folder(job)
    with hold_lock(launch.scheduler_lock(jobs.home)):
        assert jobs.launch(job, QUANTDECK_FAILPOINT=step).wait(60) == -signal.SIGKILL
        assert jobs.get(job).state == "running"
        visible = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
        assert visible == {"publish.renamed": ["w4"], "publish.done": ["w4"], "stage.publish": ["w4"]}.get(
            step, ["w3", "w4"] if step in ("stage.report", "finish.result") else []
        )
        assert all(check_manifest(folder / name) == [] for name in visible)
        before = {name: (weights(folder / name), (folder / name).stat().st_ino) for name in visible}
    launch.ensure_scheduler(jobs.home)
    done = jobs.until(job)
    assert (done.state, done.attempt, done.outcome) == ("succeeded", 2, None), done.reason
    assert sorted(p.name for p in folder.iterdir()) == ["w3", "w4"]
    for name in ("w4", "w3"):
        assert check_manifest(folder / name) == []
        if name in before:
            assert (weights(folder / name), (folder / name).stat().st_ino) == before[name]
    assert jobs.calls(job) == [0]
    assert [e["artefact"] for e in done.result["results"]] == [str(folder / "w4"), str(folder / "w3")]
    jobs.is_over(job)
    assert not (jobs.home.run_dir(job.uid) / "out.tmp").exists()


def test_a_runner_killed_after_its_last_word_has_succeeded(jobs):
    job = jobs.create({"name": "w4"})
    assert jobs.launch(job, QUANTDECK_FAILPOINT="finish.moved").wait(60) == -signal.SIGKILL
    done = jobs.get(job)
    assert (done.state, done.attempt) == ("succeeded", 1) and check_manifest(jobs.folder(job)) == []
    jobs.is_over(job)


def test_a_failpoint_that_is_not_named_does_nothing(jobs):
    job = jobs.create({"name": "w4"})
    assert jobs.launch(job, QUANTDECK_FAILPOINT="publish").wait(60) == 0
    assert jobs.get(job).state == "succeeded"
