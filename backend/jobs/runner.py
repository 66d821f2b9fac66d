"""The runner: one process per job, in a session of its own, that outlives the dashboard.

Started as `python -m backend.jobs.runner HOME UID`. It holds a lock for its whole life (a held lock is the
proof that the job is alive), waits for its turn, runs the stages as child processes and stores what happens.
It imports no torch, so that it stays small while a stage fills the memory.
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
from functools import partial
from typing import Any

from backend.disk import Ballast, DiskFullError, is_disk_full, unwritten_path
from backend.engines.configurations import configurations
from backend.errors import JobError, QuantdeckError
from backend.jobs.program import run_program
from backend.jobs.run import Cost, Run
from backend.jobs.stages import Stage, stages_of
from backend.jobs.store import Job, JobStore
from backend.paths import Home
from backend.process import adopt_orphans, hold_lock
from backend.schema import parse_yaml

STORE_EVERY_S = 1.0

log = logging.getLogger("quantdeck.runner")


class Cancelled(QuantdeckError):
    """Somebody cancelled the job."""


class Runner:
    """Takes one job from `queued` to a final state.

    Args:
        home: The home it belongs to.
        uid: The job.
    """

    def __init__(self, home: Home, uid: str) -> None:
        self.home = home
        self.store = JobStore(home)
        self.job: Job = self.store.get(uid)
        self.run_dir = home.run_dir(uid)
        self.config = parse_yaml(self.job.config_yaml).config
        self.log_file = home.log_file(self.config)
        self.ballast = Ballast(self.run_dir / "ballast")
        self._stored_at = self._checked_at = 0.0
        self._stop_requested = False
        self._unstored: dict[str, Any] = {}
        self._first_steps: dict[tuple[str, str], tuple[int, float]] = {}

    def run(self) -> None:
        """Wait for the device, run every stage, store the outcome."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if not self._wait_for_turn():
            return
        log.info(
            "job %s (%s) starts on %s, process %d, attempt %d",
            self.job.job_id, self.job.uid, self.job.device, os.getpid(), self.job.attempt,
        )  # fmt: skip
        run = Run(self.home, self.job, self.config, self.run_dir, ())
        try:
            self.ballast.take()
            run.configurations = tuple(configurations(self.config))
            self._run_stages(run)
        except Cancelled:
            self._finish("cancelled", f"cancelled during stage '{run.stage}'", run)
        except QuantdeckError as error:
            self._finish("failed", f"stage '{run.stage}': {error.message}", run)
        except OSError as error:
            why = f"{error.strerror or error} ({error.filename or 'no file'})"
            self._finish("failed", f"stage '{run.stage}': {why}", run)
        except Exception as error:
            log.error("%s", traceback.format_exc())
            self._finish("failed", f"stage '{run.stage}': internal error, {type(error).__name__}: {error}", run)
        else:
            if run.failures:
                self._finish("failed", _failures(run), run)
            else:
                self._clean_up(run)
                self._finish("succeeded", None, run)

    def _run_stages(self, run: Run) -> None:
        for stage in stages_of(run):
            self._check_cancelled()
            if stage.configuration is not None and stage.configuration.name in run.failures:
                continue
            try:
                self._run_stage(stage, run)
            except (Cancelled, DiskFullError):
                raise
            except Exception as error:
                if is_disk_full(error):
                    folder, needed = stage.writes(run)
                    raise DiskFullError(unwritten_path(error) or folder, needed) from error
                if not stage.may_fail or stage.configuration is None or not isinstance(error, QuantdeckError):
                    raise
                log.error("stage %s failed, the other configurations go on: %s", run.stage, error.message)
                run.failures[stage.configuration.name] = f"stage '{stage.label}': {error.message}"

    def _clean_up(self, run: Run) -> None:
        """Remove what only an unfinished job needs."""
        for folder in (run.checkpoint_dir, run.staging):
            shutil.rmtree(folder, ignore_errors=True)

    def _on_sigterm(self, *_: Any) -> None:
        self._stop_requested = True

    def _wait_for_turn(self) -> bool:
        while not self.store.claim(self.job.uid, self.job.attempt):
            job = self.store.get(self.job.uid)
            if job.state != "queued" or job.attempt != self.job.attempt:
                return False
            if self._stop_requested:
                self.store.move(
                    job.uid, "cancelled", actor="runner", attempt=job.attempt, reason="stopped while waiting"
                )
                return False
            _reconcile_others(self.home, self.job.uid)
            time.sleep(1.0)
        self.job = self.store.get(self.job.uid)
        return True

    def _finish(self, state: Any, reason: str | None, run: Run) -> None:
        self.ballast.drop()
        log.info("job %s: %s%s", self.job.job_id, state, f" ({reason})" if reason else "")
        if run.result:
            self.store.update(self.job.uid, self.job.attempt, result=run.result)
        if state == "failed" and self.store.get(self.job.uid).state == "cancelling":
            state = "cancelled"  # the failure is the stop that was asked for
        if not self.store.move(self.job.uid, state, actor="runner", attempt=self.job.attempt, reason=reason):
            # A cancel came between the last stage and here: the work was stopped or is complete; either is final.
            self.store.move(self.job.uid, "cancelled", actor="runner", attempt=self.job.attempt, reason="cancelled")

    def _check_cancelled(self) -> None:
        if self._stop_requested or self.store.get(self.job.uid).state == "cancelling":
            raise Cancelled("cancelled")

    def _run_stage(self, stage: Stage, run: Run) -> None:
        named = run.several and stage.configuration is not None
        run.stage = f"{stage.label} ({stage.configuration.name})" if named and stage.configuration else stage.label
        where = {"configuration": stage.configuration.name} if named and stage.configuration else {}
        self._progress({"stage": stage.name, "step": 0, "total": 0, "message": "", **where}, force=True)
        began, before = time.perf_counter(), time.process_time()
        key = stage.key(run) if stage.key else None
        cost = run.kept(stage.file, key) if key else None
        if cost is not None and _is_intact(stage, run):
            log.info("stage %s was done by an earlier attempt", run.stage)
        else:
            cost = self._work(stage, run, key)
        if cost is not None:
            run.note_cost(stage.name, cost, stage.configuration)
        stage.finish(run)
        if stage.key is None:
            run.note_cost(stage.name, _own_cost(began, before), stage.configuration)
        if run.artefact:
            self.store.update(self.job.uid, self.job.attempt, artefact=str(run.artefact), result=run.result)
        log.info("stage %s took %.1f s", run.stage, time.perf_counter() - began)

    def _work(self, stage: Stage, run: Run, key: str | None) -> Cost | None:
        """Do a stage, whatever earlier attempts left of it; returns its cost if it has a result."""
        began, before = time.perf_counter(), time.process_time()
        run.forget(stage.file)
        command = stage.command(run)
        if command is not None:
            log.info("stage %s: %s", run.stage, command.module)
            usage = run_program(
                command, device=self.job.device, events_file=self.run_dir / "events.jsonl", log_file=self.log_file,
                on_event=self._follow, on_poll=self._on_poll, writes=partial(stage.writes, run),
            )  # fmt: skip
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

    def _on_poll(self) -> None:
        self._store_progress()
        if self._stop_requested or time.monotonic() - self._checked_at >= STORE_EVERY_S:
            self._checked_at = time.monotonic()
            self._check_cancelled()

    def _follow(self, event: dict[str, Any]) -> None:
        if "stage" not in event:
            return
        about = event.get("configuration") or ""
        step, total = event.get("step") or 0, event.get("total") or 0
        progress = {
            "stage": event["stage"],
            "step": step,
            "total": total,
            "eta_s": self._eta((event["stage"], about), step, total, event["t"]),
            "message": event.get("message") or event.get("layer") or "",
            **({"configuration": about} if about else {}),
        }
        self._progress(progress, force=step == total)

    def _eta(self, stage: tuple[str, str], step: int, total: int, at: float) -> float | None:
        """Seconds left in a stage of a configuration.

        It is judged from the pace since the first step: the loading before that says nothing about steps.
        """
        if not step:
            return None
        first_step, first_at = self._first_steps.setdefault(stage, (step, at))
        return round((at - first_at) / (step - first_step) * (total - step), 1) if step > first_step else None

    def _progress(self, progress: dict[str, Any], *, force: bool) -> None:
        self._unstored = progress
        self._store_progress(force=force)

    def _store_progress(self, *, force: bool = False) -> None:
        """Store the latest progress, about once a second: the last of a burst of events must not be lost."""
        if self._unstored and (force or time.monotonic() - self._stored_at >= STORE_EVERY_S):
            self._stored_at = time.monotonic()
            self.store.update(self.job.uid, self.job.attempt, progress=self._unstored)
            self._unstored = {}


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


def _failures(run: Run) -> str:
    """Which configurations were not measured, and why."""
    told = "; ".join(f"{name}: {reason}" for name, reason in run.failures.items())
    return (
        f"{len(run.failures)} of {len(run.configurations)} configurations could not be measured. {told}. All models "
        "are saved and the others' results are kept; resuming measures what is missing"
    )


def _reconcile_others(home: Home, uid: str) -> None:
    # A dead job ahead in the queue must not block this one for ever.
    from backend.jobs.control import reconcile

    with contextlib.suppress(JobError):
        reconcile(home, besides=uid)


def main() -> None:
    """Run the job given on the command line, unless another runner already has it."""
    home, uid = Home.at(sys.argv[1]), sys.argv[2]
    adopt_orphans()
    with hold_lock(home.run_dir(uid) / "runner.lock") as lock:
        if lock is None:
            return
        runner = Runner(home, uid)
        runner.log_file.parent.mkdir(parents=True, exist_ok=True)
        logging.basicConfig(
            filename=runner.log_file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
        )
        runner.run()


if __name__ == "__main__":
    main()
