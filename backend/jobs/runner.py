"""The runner: one process per job, in a session of its own, that outlives the dashboard.

Started as `python -m backend.jobs.runner HOME UID`. It holds a lock for its whole life (a held lock is the
proof that the job is alive), waits for its turn, runs the stages as child processes and stores what happens.
It imports no torch, so that it stays small while a stage fills the memory.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from backend.errors import EngineError, JobError, QuantdeckError
from backend.jobs.devices import device_environment
from backend.jobs.events import read_events, read_lines
from backend.jobs.stages import STAGES, Run, Stage
from backend.jobs.store import Job, JobStore
from backend.paths import PROJECT, Home
from backend.process import PARENT_VARIABLE, QUIET_THREADS, adopt_orphans, end_tree, hold_lock
from backend.schema import parse_yaml

POLL_S = 0.2
STORE_EVERY_S = 1.0
CANCEL_GRACE_S = 5.0

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
        self._stored_at = self._checked_at = 0.0
        self._stop_requested = False
        self._first_steps: dict[str, tuple[int, float]] = {}

    def run(self) -> None:
        """Wait for the device, run every stage, store the outcome."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        if not self._wait_for_turn():
            return
        log.info("job %s (%s) starts on %s, process %d", self.job.job_id, self.job.uid, self.job.device, os.getpid())
        run = Run(self.home, self.job, self.config, self.run_dir)
        try:
            for stage in STAGES:
                self._check_cancelled()
                if stage.is_needed(run):
                    self._run_stage(stage, run)
        except Cancelled:
            self._finish("cancelled", f"cancelled during stage '{run.stage}'", run)
        except QuantdeckError as error:
            self._finish("failed", f"stage '{run.stage}': {error.message}", run)
        except OSError as error:
            self._finish(
                "failed", f"stage '{run.stage}': {error.strerror or error} ({error.filename or 'no file'})", run
            )
        except Exception as error:
            log.error("%s", traceback.format_exc())
            self._finish("failed", f"stage '{run.stage}': internal error, {type(error).__name__}: {error}", run)
        else:
            self._finish("succeeded", None, run)

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
        run.stage = stage.label
        self._progress({"stage": stage.name, "step": 0, "total": 0, "message": ""}, force=True)
        began = time.perf_counter()
        command = stage.command(run)
        if command is not None:
            usage = self._child(stage.label, command, run)
            run.note_usage(stage.name, time.perf_counter() - began, usage)
        before = time.process_time()
        stage.finish(run)
        if command is None:
            run.timings[stage.name] = {
                "wall_s": round(time.perf_counter() - began, 3),
                "cpu_s": round(time.process_time() - before, 3),
            }
        if run.artefact:
            self.store.update(self.job.uid, self.job.attempt, artefact=str(run.artefact))
        log.info("stage %s took %.1f s", stage.label, time.perf_counter() - began)

    def _child(self, label: str, command: list[str], run: Run) -> Any:
        """Run one stage program to its end; its events are followed, a cancel ends it.

        Returns:
            Its resource usage (`resource.struct_rusage`).
        """
        log.info("stage %s: %s", label, command[2])
        events_file = self.run_dir / "events.jsonl"
        cursor = events_file.stat().st_size if events_file.exists() else 0
        log_start = self.log_file.stat().st_size
        environment = {
            **os.environ,
            **device_environment(self.job.device),
            **QUIET_THREADS,
            PARENT_VARIABLE: str(os.getpid()),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONUNBUFFERED": "1",
        }
        with open(events_file, "ab") as out, open(self.log_file, "ab") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=PROJECT, env=environment,
                start_new_session=True,
            )  # fmt: skip
        error = None
        try:
            while True:
                done, status, usage = os.wait4(process.pid, os.WNOHANG)
                events, cursor = read_events(events_file, cursor)
                for event in events:
                    if event.get("stage") == "error":
                        error = event["message"]
                    else:
                        self._follow(event)
                if done:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                self._check_cancelled_now_and_then()
                time.sleep(POLL_S)
        except BaseException:
            end_tree(process, grace_s=CANCEL_GRACE_S)
            raise
        if process.returncode != 0:
            raise EngineError(error or _exit_reason(process.returncode, self.log_file, log_start))
        return usage

    def _check_cancelled_now_and_then(self) -> None:
        if self._stop_requested or time.monotonic() - self._checked_at >= STORE_EVERY_S:
            self._checked_at = time.monotonic()
            self._check_cancelled()

    def _follow(self, event: dict[str, Any]) -> None:
        if "stage" not in event:
            return
        step, total = event.get("step") or 0, event.get("total") or 0
        progress = {
            "stage": event["stage"],
            "step": step,
            "total": total,
            "eta_s": self._eta(event["stage"], step, total, event["t"]),
            "message": event.get("message") or event.get("layer") or "",
        }
        self._progress(progress, force=step == total)

    def _eta(self, stage: str, step: int, total: int, at: float) -> float | None:
        """Seconds left in a stage, from the pace since its first step: loading before it says nothing about steps."""
        if not step:
            return None
        first_step, first_at = self._first_steps.setdefault(stage, (step, at))
        return round((at - first_at) / (step - first_step) * (total - step), 1) if step > first_step else None

    def _progress(self, progress: dict[str, Any], *, force: bool) -> None:
        if force or time.monotonic() - self._stored_at >= STORE_EVERY_S:
            self._stored_at = time.monotonic()
            self.store.update(self.job.uid, self.job.attempt, progress=progress)


def _exit_reason(code: int, log_file: Path, log_start: int) -> str:
    """Why a stage program ended, from its exit code and the end of what it wrote to the log."""
    lines, _ = read_lines(log_file, log_start)
    tail = " | ".join(line.strip() for line in lines[-3:] if line.strip())
    if code == -signal.SIGKILL:
        return "its process was killed by the system (signal 9), most likely for lack of memory"
    what = f"was ended by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
    return f"its process {what}. Last lines of the log: {tail or 'none'}"


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
