"""The runner: one process per attempt at a job, in a session of its own, that outlives the dashboard.

Started as `python -m backend.jobs.runner HOME UID ATTEMPT` for a job whose resources were granted. It holds a lock
for its whole life (a held lock is the proof that the job is alive), runs the stages as child processes and stores
what happens. A second thread counts up the heartbeat; if the store answers that another attempt has taken over, the
runner ends its programs and stores nothing more. It imports no torch, so that it stays small while a stage fills
the memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from backend.disk import Ballast, DiskFullError, free_bytes, is_disk_full, mount_point, unwritten_path
from backend.engines.configurations import configurations
from backend.errors import JobError, QuantdeckError
from backend.files import write_json
from backend.jobs.devices import device_environment
from backend.jobs.heart import Cancelled, Heart, ShutDown, Stopped, Superseded
from backend.jobs.launch import watch
from backend.jobs.logs.writer import LogHandler, LogWriter
from backend.jobs.outcomes import HaltError, Outcome, outcome_of
from backend.jobs.program import Watch, run_program
from backend.jobs.progress import Progress
from backend.jobs.redact import redact
from backend.jobs.run import Cost, Run
from backend.jobs.stage import Stage
from backend.jobs.stages import stages_of
from backend.jobs.store import Job, JobStore
from backend.jobs.trust import code_modules
from backend.jobs.usage import USAGE_FILE, Sampler
from backend.paths import Home
from backend.process import JOB_VARIABLE, adopt_orphans, end_leftovers, failpoint, hold_lock, process_facts
from backend.schema import parse_yaml
from backend.settings import Settings
from backend.sources import hub_token

CHECK_EVERY_S = 1.0
DISK_EVERY_S = 5.0
STORE_PATIENCE_S = 600.0
SHUTDOWN_GRACE_S = (10.0, 5.0)

log = logging.getLogger("quantdeck.runner")
T = TypeVar("T")


class Runner:
    """Takes one attempt at a job from `starting` to a final state.

    Args:
        home: The home it belongs to.
        job: The job, at the attempt to run.
        settings: Of the home.
        output: The job's log.
    """

    def __init__(self, home: Home, job: Job, settings: Settings, output: LogWriter) -> None:
        self.home = home
        self.store = JobStore(home)
        self.job = job
        self.settings = settings
        self.output = output
        self.run_dir = home.run_dir(job.uid)
        self.config = parse_yaml(job.config_yaml).config
        self.ballast = Ballast(self.run_dir / "ballast")
        self.heart = Heart(self.store, job)
        self._began = time.monotonic()
        self.progress = Progress(self.store, job)
        self._checked_at = self._disk_at = float("-inf")
        self.shut_down = False
        self._ending = ""

    def run(self) -> None:
        """Run every stage and store the outcome."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGINT, self._on_sigterm)
        if not self._begin():
            return
        log.info(
            "job %s (%s) starts on %s, process %d, attempt %d",
            self.job.job_id, self.job.uid, self.job.device, os.getpid(), self.job.attempt,
        )  # fmt: skip
        run = Run(self.home, self.job, self.config, self.run_dir, ())
        self.heart.start()
        try:
            with Sampler(self.run_dir / USAGE_FILE, self.job.attempt, self._gpus, self.progress.work):
                self._work_through(run)
        except Superseded:
            log.warning("another attempt at the job has begun, or it was removed; this one ends and stores nothing")
        except ShutDown:
            log.warning("the runner was asked to end during stage '%s'; the next attempt goes on from there", run.stage)
        finally:
            self.heart.end()

    def _work_through(self, run: Run) -> None:
        try:
            self._check_stopped()
            self.ballast.take()
            run.configurations = tuple(configurations(self.config, self.job.device))
            run.begin_redo()
            self._run_stages(run)
        except Cancelled:
            self._finish("cancelled", f"cancelled during stage '{run.stage}'", run, "cancelled")
        except QuantdeckError as error:
            self._finish("failed", f"stage '{run.stage}': {error.message}", run, outcome_of(error))
        except OSError as error:
            why = f"{error.strerror or error} ({error.filename or 'no file'})"
            self._finish("failed", f"stage '{run.stage}': {why}", run, outcome_of(error))
        except MemoryError as error:
            self._finish("failed", f"stage '{run.stage}': the runner found no memory", run, outcome_of(error))
        except Stopped:
            raise
        except Exception as error:
            log.error("%s", traceback.format_exc())
            why = f"internal error, {type(error).__name__}: {error}"
            self._finish("failed", f"stage '{run.stage}': {why}", run, outcome_of(error))
        else:
            if run.failures:
                self._finish("failed", run.told_failures(), run, next(iter(run.outcomes.values())))
            else:
                self._clean_up(run)
                self._finish("succeeded", run.result.get("incomplete"), run)

    def _begin(self) -> bool:
        """Take the job over; False if it is not there to be run any more."""
        uid, attempt = self.job.uid, self.job.attempt
        if self._patiently(lambda: self.store.move(uid, "running", actor="runner", attempt=attempt)):
            self.job = self._patiently(lambda: self.store.get(uid))
            return True
        # A cancel may have come between the launch and here.
        self._patiently(
            lambda: self.store.move(
                uid,
                "cancelled",
                actor="runner",
                attempt=attempt,
                reason="cancelled before it started",
                outcome="cancelled",
                only_from="cancelling",
            )  # fmt: skip
        )
        return False

    def _run_stages(self, run: Run) -> None:
        for stage in stages_of(run):
            self._check_stopped()
            if stage.configuration is not None and stage.configuration.name in run.failures:
                continue
            try:
                self._run_stage(stage, run)
            except DiskFullError:
                raise
            except Exception as error:
                if isinstance(error, Stopped):
                    raise
                if is_disk_full(error):
                    folder, needed = stage.writes(run)
                    raise DiskFullError(unwritten_path(error) or folder, needed) from error
                spared = stage.may_fail and stage.configuration is not None
                if not spared or not isinstance(error, QuantdeckError) or isinstance(error, HaltError):
                    raise
                log.error("stage %s failed, the other configurations go on: %s", run.stage, error.message)
                assert stage.configuration is not None
                run.failures[stage.configuration.name] = f"stage '{stage.label}': {error.message}"
                run.outcomes[stage.configuration.name] = outcome_of(error)

    def _clean_up(self, run: Run) -> None:
        """Remove what only an unfinished job needs."""
        for folder in (run.checkpoint_dir, run.staging):
            shutil.rmtree(folder, ignore_errors=True)

    def _on_sigterm(self, *_: Any) -> None:
        self.shut_down = True

    def _finish(self, state: Any, reason: str | None, run: Run, outcome: Outcome | None = None) -> None:
        """Store the end of the job, however long the store is busy."""
        self.ballast.drop()
        uid, attempt, reason = self.job.uid, self.job.attempt, redact(reason) if reason else None
        log.info("job %s: %s%s", self.job.job_id, state, f" ({reason})" if reason else "")
        if run.result:
            self._patiently(lambda: self.store.update(uid, attempt, result=run.result))
        failpoint("finish.result")
        if state == "failed" and self._patiently(lambda: self.store.get(uid)).state == "cancelling":
            state, outcome = "cancelled", "cancelled"  # the failure is the stop that was asked for
        run.end_redo()
        told: dict[str, Any] = {"actor": "runner", "attempt": attempt}
        if not self._patiently(lambda: self.store.move(uid, state, reason=reason, outcome=outcome, **told)):
            # A cancel came between the last stage and here: the work was stopped or is complete; either is final.
            self._patiently(lambda: self.store.move(uid, "cancelled", reason="cancelled", outcome="cancelled", **told))
        failpoint("finish.moved")

    def _patiently(self, call: Callable[[], T]) -> T:
        """What the store answers, asked again and again while it is busy, full or unreadable."""
        deadline = time.monotonic() + STORE_PATIENCE_S
        while True:
            try:
                return call()
            except JobError as error:
                if self.heart.superseded.is_set():
                    raise Superseded from error
                if time.monotonic() >= deadline:
                    raise
                log.warning("%s; trying again", error.message)
            time.sleep(CHECK_EVERY_S)

    def _check_stopped(self) -> None:
        """Raise if the job is not to go on."""
        if self.heart.superseded.is_set():
            raise Superseded
        if self.shut_down:
            raise ShutDown
        try:
            job = self.store.get(self.job.uid)
        except JobError as error:
            log.warning("the job store does not answer: %s", error.message)
            return
        if job.attempt != self.job.attempt or not job.is_active:
            raise Superseded
        if job.state == "cancelling":
            raise Cancelled
        limit = self.job.time_limit_s
        if limit is not None and time.monotonic() - self._began >= limit:
            raise HaltError(
                f"the time limit of {_duration(limit)} is over (TIME_LIMIT_HOURS). What is finished is kept: "
                "resume the job to go on where it stopped, with the whole time again",
                "time_limit",
            )

    def _run_stage(self, stage: Stage, run: Run) -> None:
        named = run.several and stage.configuration is not None
        run.stage = f"{stage.label} ({stage.configuration.name})" if named and stage.configuration else stage.label
        where = {"configuration": stage.configuration.name} if named and stage.configuration else {}
        self.progress.show({"stage": stage.name, "step": 0, "total": 0, "message": "", **where}, force=True)
        began, before = time.perf_counter(), time.process_time()
        key = stage.key(run) if stage.key else None
        cost = run.kept(stage.file, key, of_any_key=run.keeps_models and stage.makes_models) if key else None
        if cost is not None and _is_intact(stage, run):
            log.info("stage %s was done by an earlier attempt", run.stage)
        else:
            cost = self._work(stage, run, key)
        if cost is not None:
            run.note_cost(stage.name, cost, stage.configuration)
        self._check_stopped()
        stage.finish(run)
        if stage.key is None:
            run.note_cost(stage.name, _own_cost(began, before), stage.configuration)
        failpoint(f"stage.{stage.name}")
        if run.artefact:
            stored = {"artefact": str(run.artefact), "result": run.result}
            self._patiently(lambda: self.store.update(self.job.uid, self.job.attempt, **stored))
        log.info("stage %s took %.1f s", run.stage, time.perf_counter() - began)

    def _work(self, stage: Stage, run: Run, key: str | None) -> Cost | None:
        """Do a stage, whatever earlier attempts left of it; returns its cost if it has a result."""
        began, before = time.perf_counter(), time.process_time()
        run.forget(stage.file)
        command = stage.command(run)
        if command is not None:
            # Asked at every program: the operator may have changed their mind.
            command = replace(command, code_modules=code_modules(self.home, self.job))
            log.info("stage %s: %s", run.stage, command.module)
            watch = Watch(
                on_event=self.progress.follow, on_poll=self._on_poll, on_signal=self._tell_signal,
                on_stuck=self._tell_stuck, grace_s=self._grace_s, writes=partial(stage.writes, run),
            )  # fmt: skip
            usage = run_program(
                command, device=self._devices(), events_file=self.run_dir / "events.jsonl", log=self.output, watch=watch
            )
            cost = {
                "wall_s": round(time.perf_counter() - began, 3),
                "cpu_s": round(usage.ru_utime + usage.ru_stime, 3),
                "peak_rss_bytes": usage.ru_maxrss * 1024,  # the kernel counts in KiB
            }
        else:
            cost = _own_cost(began, before)
        if key is None:
            return None
        run.keep(stage.file, key, cost)
        return cost

    def _devices(self) -> dict[str, str]:
        """The variables that show a program the GPUs that the job was granted, or none."""
        shown, gpus = device_environment(self.job.device), self._gpus()
        return {**shown, "CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else shown

    def _gpus(self) -> list[str]:
        """The UUIDs of the GPUs that the job was granted."""
        leases = self._patiently(self.store.leases)
        mine = [one.resource for one in leases if (one.uid, one.attempt) == (self.job.uid, self.job.attempt)]
        return [resource.removeprefix("gpu:") for resource in mine if resource.startswith("gpu:")]

    def _grace_s(self, error: BaseException) -> Sequence[float]:
        self._ending = "cancelling" if isinstance(error, Cancelled) else "stopping"
        if isinstance(error, Superseded):
            return ()  # another attempt may be about to write where these programs write
        return SHUTDOWN_GRACE_S if isinstance(error, ShutDown) else self.settings.jobs.cancel_grace_s

    def _tell_signal(self, name: str) -> None:
        """Show which signal is sent to end the program."""
        log.info("ending the program: %s", name)
        what = "killed" if name == "SIGKILL" else "asked to stop"
        self.progress.tell(f"{self._ending}: {what} ({name})")

    def _tell_stuck(self, pids: list[int]) -> None:
        """Show which processes the kernel cannot end, as in the middle of a driver's call."""
        log.error("processes %s do not end; the job keeps its devices until they do", pids)
        self.progress.tell(f"waiting for processes {', '.join(map(str, pids))}, which the kernel cannot end yet")

    def _on_poll(self) -> None:
        self.progress.store()
        now = time.monotonic()
        if self.shut_down or self.heart.superseded.is_set() or now - self._checked_at >= CHECK_EVERY_S:
            self._checked_at = now
            self._check_stopped()
        if now - self._disk_at >= DISK_EVERY_S:
            self._disk_at = now
            wanted, free = self.settings.jobs.min_free_bytes, free_bytes(self.run_dir)
            if free < wanted:
                raise HaltError(
                    f"only {free / 1e9:.3g} GB are free on the disk at {mount_point(self.run_dir)}; quantdeck.toml "
                    f"(min_free_bytes) leaves {wanted / 1e9:.3g} GB free. Free some space and resume the job: it goes "
                    "on where it stopped",
                    "disk_full",
                )


def _is_intact(stage: Stage, run: Run) -> bool:
    try:
        return stage.intact(run)
    except (QuantdeckError, OSError, ValueError, KeyError):
        return False  # something is gone or damaged: the stage is done again


def _own_cost(began: float, before: float) -> Cost:
    """What the runner itself has spent since two clock readings."""
    return {
        "wall_s": round(time.perf_counter() - began, 3),
        "cpu_s": round(time.process_time() - before, 3),
    }


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:g} hours" if seconds >= 3600 else f"{seconds:g} seconds"


def main() -> None:
    """Run the attempt given on the command line, unless another runner already has the job or it was superseded."""
    home, uid, attempt = Home.at(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    os.environ[JOB_VARIABLE] = f"{uid}:{attempt}"
    adopt_orphans()
    run_dir = home.run_dir(uid)
    with hold_lock(run_dir / "runner.lock") as lock:
        if lock is None:
            return
        store = JobStore(home)
        job = store.get(uid)
        if job.attempt != attempt or job.state not in ("starting", "cancelling"):
            return
        try:
            write_json(run_dir / "runner.json", {**process_facts(), "attempt": attempt})
            end_leftovers(uid)  # of an earlier attempt, before they meet this one's files
            settings = Settings.load(home)
            hub_token.read(hub_token.token_file(home))  # known to the log before the first line
            with LogWriter(home.log_file(parse_yaml(job.config_yaml).config), settings.jobs) as output:
                logging.basicConfig(handlers=[LogHandler(output)], level=logging.INFO)
                runner = Runner(home, job, settings, output)
                runner.run()
        except (QuantdeckError, OSError) as error:  # before the first stage: what came later was stored
            reason = f"the job could not be started: {getattr(error, 'message', None) or error}"
            told: dict[str, Any] = {"attempt": attempt, "reason": redact(reason), "outcome": outcome_of(error)}
            store.move(uid, "failed", actor="runner", **told)
            raise
    if not runner.shut_down:
        _wake_scheduler(home)


def _wake_scheduler(home: Home) -> None:
    """See to it that somebody starts the next job; that one must not be taken for a process of this job."""
    os.environ.pop(JOB_VARIABLE, None)
    with contextlib.suppress(Exception):
        watch(home)


if __name__ == "__main__":
    main()
