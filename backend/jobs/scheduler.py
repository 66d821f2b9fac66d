"""The scheduler: one process per home that starts waiting jobs and takes care of those whose runner is gone.

Started as `python -m backend.jobs.scheduler HOME`, in a session of its own. It holds a lock for its whole life, so
there is one at a time; it ends when there is nothing to do, and whoever looks at jobs starts it again
(`backend.jobs.launch.watch`). It never works on a job itself: killing it changes nothing for a running one.

Decisions rest on locks, on counters and on this process's monotonic clock, never on the time of day.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from backend.errors import QuantdeckError
from backend.jobs.complaints import Complaints
from backend.jobs.devices import Gpu, gpu_numbers, gpus
from backend.jobs.heartbeats import Heartbeats
from backend.jobs.launch import scheduler_lock, start_runner
from backend.jobs.plan import plan
from backend.jobs.states import ACTIVE, STARTED
from backend.jobs.store import Job, JobStore, StoreBusyError
from backend.paths import Home
from backend.process import boot_id, end_leftovers, hold_lock, lock_is_held, processes_of
from backend.settings import Settings

TICK_S = 0.5
SHORTEST_REST_S = 0.05
LONGEST_REST_S = 5.0
IDLE_S = 30.0
LAUNCH_GRACE_S = 20.0
SLOW_LAUNCH_S = 180.0
"""How long a runner may take to hold its lock: if no process of it is to be seen, and if one is (a busy machine)."""
STALLED_S = 60.0
ALL = 1_000_000

log = logging.getLogger("quantdeck.scheduler")


class Scheduler:
    """Looks after the jobs of one home, one `tick` at a time.

    Args:
        home: The home.
        clock: Seconds that only go forward.
        launch: Starts the runner of an attempt.
        devices: The GPUs of this machine, now.
        boot: The id of this boot of the machine.
        stalled_s: After how long without a heartbeat a job is marked.
    """

    def __init__(
        self,
        home: Home,
        *,
        clock: Callable[[], float] = time.monotonic,
        launch: Callable[[Home, str, int], subprocess.Popen[bytes] | None] | None = None,
        devices: Callable[[], list[Gpu]] = gpus,
        boot: Callable[[], str] = boot_id,
        stalled_s: float = STALLED_S,
    ) -> None:
        self.home = home
        self.store = JobStore(home)
        self._clock, self._launch, self._devices, self._boot = clock, launch or start_runner, devices, boot
        self._heartbeats = Heartbeats(clock, stalled_s)
        self._settings = Settings()
        self._complaints = Complaints(log)
        self._runners: dict[tuple[str, int], subprocess.Popen[bytes]] = {}
        self._seen: dict[tuple[str, int], float] = {}

    def tick(self) -> None:
        """Look at every active job once: the dead, the silent, the waiting."""
        self._load_settings()
        self._heartbeats.begin_round()
        begun = self.store.summaries(states=(*STARTED, "lost"), limit=ALL)
        for job in begun:
            # What is wrong with one job must not keep the others from starting; a busy store is no job's fault.
            with self._complaints.told(f"job {job.job_id} ({job.uid})", through=StoreBusyError):
                self._look_after(job)
        self._forget({(job.uid, job.attempt) for job in begun})
        if waiting := self.store.summaries(states=("queued",), limit=ALL):
            self._start(waiting)

    def _look_after(self, job: Job) -> None:
        alive = self._has_runner(job)
        if job.state == "lost" and not alive:
            self._after_loss(job)
        elif job.state in STARTED and alive:
            self._watch_heartbeat(job)
        elif job.state in STARTED:
            self._bury(job)

    def _has_runner(self, job: Job) -> bool:
        return lock_is_held(self.home.run_dir(job.uid) / "runner.lock")

    def _load_settings(self) -> None:
        with self._complaints.told("the settings stay as they were"):
            self._settings = Settings.load(self.home)

    def _forget(self, present: set[tuple[str, int]]) -> None:
        ended = {key for key, runner in self._runners.items() if runner.poll() is not None}  # this reaps it, too
        self._runners = {key: r for key, r in self._runners.items() if key in present or key not in ended}
        self._seen = {key: at for key, at in self._seen.items() if key in present}
        self._heartbeats.keep_only(present)

    # -- jobs whose runner is gone

    def _bury(self, job: Job) -> None:
        """End what is left of an attempt whose runner does not hold its lock, then say what became of the job."""
        facts = _runner_facts(self.home, job)
        if job.state == "starting" and facts is None and self._may_still_come(job):
            return
        if left := end_leftovers(job.uid):
            log.warning("job %s: processes %s do not end; it keeps its resources", job.job_id, left)
            return
        restarted = facts is not None and facts.get("boot_id") != self._boot()
        outcome = "machine_restarted" if restarted else "runner_died"
        if job.state == "cancelling":
            reason = "cancelled; its runner was gone already"
            self._moved(job, "cancelled", reason, "cancelled")
            return
        stage = job.progress.get("stage", "start")
        why = "the machine was restarted" if restarted else "the runner process died (killed, or out of memory)"
        if facts is None and job.state == "starting":
            why = "the runner process did not start; see runner.out in the job's working folder"
        # The job may have come to its end since we looked: then this changes nothing.
        if self._moved(job, "lost", f"{why} during stage '{stage}'", outcome):
            self._after_loss(self.store.get(job.uid))

    def _may_still_come(self, job: Job) -> bool:
        waited = self._clock() - self._seen.setdefault((job.uid, job.attempt), self._clock())
        runner = self._runners.get((job.uid, job.attempt))
        if runner is not None and runner.poll() is not None:
            return False
        if waited < LAUNCH_GRACE_S:
            return True
        return waited < SLOW_LAUNCH_S and bool(processes_of(job.uid))

    def _moved(self, job: Job, to: Any, reason: str, outcome: str) -> bool:
        moved = self.store.move(
            job.uid, to, actor="scheduler", attempt=job.attempt, reason=reason, outcome=outcome, only_from=job.state
        )
        if moved:
            log.info("job %s (%s), attempt %d: %s, %s", job.job_id, job.uid, job.attempt, to, reason)
        return moved

    def _after_loss(self, job: Job) -> None:
        """Queue a lost job again, or give it up."""
        if job.state != "lost":
            return
        deaths, why = self.store.deaths(job.uid), job.reason or "the runner process died"
        if deaths < job.max_attempts:
            reason = f"{why}; it goes on where it stopped, attempt {deaths + 1} of {job.max_attempts}"
            if self.store.requeue(job.uid, job.attempt, actor="scheduler", reason=reason):
                log.info("job %s (%s) is queued again", job.job_id, job.uid)
            return
        times = f"died {deaths} times, the last time: {why}" if deaths > 1 else why
        kept = f" The quantized model is saved in {job.artefact}." if job.artefact else ""
        reason = f"{times}.{kept} Resume the job to go on where it stopped"
        self._moved(job, "failed", reason, job.outcome or "runner_died")

    # -- jobs whose runner is silent

    def _watch_heartbeat(self, job: Job) -> None:
        """Mark a job whose heartbeat stands still. Its runner lives: it is neither killed nor started again."""
        found = self._heartbeats.look((job.uid, job.attempt), job.heartbeat)
        if found == "beats" and job.stalled:
            self.store.set_stalled(job.uid, job.attempt, False)
            log.info("job %s gives signs of life again", job.job_id)
        elif found == "silent" and not job.stalled:
            self.store.set_stalled(job.uid, job.attempt, True)
            log.warning("job %s has given no sign of life for %.0f s", job.job_id, self._heartbeats.stalled_s)

    # -- jobs that wait

    def _start(self, waiting: list[Job]) -> None:
        """Start what can start, and store why the others wait."""
        devices = self._devices() if any(job.device != "cpu" for job in waiting) else []
        waits = []
        for decision in plan(waiting, self._used(devices), devices, self._settings.jobs.cpu_slots):
            job, reason = decision.job, decision.reason
            if decision.resources and (obstacle := self._obstacle(job)):
                reason = f"waiting: {obstacle}"
            elif decision.resources and self.store.grant(job.uid, job.attempt, decision.resources):
                log.info("job %s (%s), attempt %d gets %s", job.job_id, job.uid, job.attempt, decision.resources)
                self._launched(job)
            if reason and reason != job.reason:
                waits.append((job.uid, job.attempt, reason))
        self.store.wait_all(waits)

    def _obstacle(self, job: Job) -> str:
        """What keeps a runner from being started now; empty if nothing does."""
        try:
            held = self._has_runner(job)
        except OSError as error:
            return f"its working folder cannot be used ({error.strerror}: {error.filename})"
        return "the process of its last attempt has not ended yet" if held else ""

    def _launched(self, job: Job) -> None:
        """Start the runner; where that is not possible, the job is found without one at a later tick."""
        self._seen[job.uid, job.attempt] = self._clock()
        try:
            if runner := self._launch(self.home, job.uid, job.attempt):
                self._runners[job.uid, job.attempt] = runner
        except OSError as error:
            log.error("job %s: its runner cannot be started: %s", job.job_id, error)

    def _used(self, devices: list[Gpu]) -> dict[str, str]:
        """Resource in use -> name of the job that has it."""
        started = {job.uid: job for job in self.store.summaries(states=STARTED, limit=ALL)}
        leases = self.store.leases()
        used = {lease.resource: started[lease.uid].job_id if lease.uid in started else "?" for lease in leases}
        # A job that an older version started has no leases; it has its device all the same.
        uuids = {gpu.index: gpu.uuid for gpu in devices}
        for job in started.values():
            if not any(lease.uid == job.uid for lease in leases):
                own = [f"gpu:{uuids[number]}" for number in gpu_numbers(job.device) if number in uuids]
                slot = next(f"cpu:{n}" for n in range(len(used) + 1) if f"cpu:{n}" not in used)
                used.update(dict.fromkeys(own if job.device != "cpu" else [slot], job.job_id))
        return used


def _runner_facts(home: Home, job: Job) -> dict[str, Any] | None:
    """What the runner of the present attempt wrote about itself; None if it never came that far."""
    try:
        facts = json.loads((home.run_dir(job.uid) / "runner.json").read_text(encoding="utf-8"))
        return facts if facts["attempt"] == job.attempt else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def serve(home: Home) -> bool:
    """Be the scheduler of a home until there has been nothing to do for a while.

    Returns:
        False if another process is.
    """
    with hold_lock(scheduler_lock(home)) as lock:
        if lock is None:
            return False
        scheduler, complaints = Scheduler(home), Complaints(log)
        number = scheduler.store.register("scheduler")
        log.info("works, process id noted as instance %d", number)
        busy_at = time.monotonic()
        while time.monotonic() - busy_at < IDLE_S:
            began, seen = time.monotonic(), _written(home)
            with complaints.told("a look at the jobs failed"):
                scheduler.tick()
            with complaints.told("the jobs cannot be counted"):
                if _is_needed(scheduler.store):
                    busy_at = time.monotonic()
            _rest(home, seen, 3 * (time.monotonic() - began))
        with complaints.told("the note of this scheduler stays"):
            scheduler.store.unregister(number)
        return True


def _rest(home: Home, seen: tuple[int, ...], least_s: float) -> None:
    """Wait for the next tick, which comes early if jobs.db is written meanwhile: most likely by a new job.

    Args:
        home: The home.
        seen: `_written` before the last tick looked.
        least_s: Ten thousand waiting jobs make a long tick: rest so long at least, rather than take a core.
    """
    least_s = min(max(least_s, SHORTEST_REST_S), LONGEST_REST_S)
    end = time.monotonic() + max(least_s, TICK_S)
    time.sleep(least_s)
    while _written(home) == seen and (left := end - time.monotonic()) > 0:
        time.sleep(min(SHORTEST_REST_S, left))


def _written(home: Home) -> tuple[int, ...]:
    """A few numbers that change whenever jobs.db is written."""
    found: list[int] = []
    for path in (home.jobs_db, home.jobs_db.with_name(f"{home.jobs_db.name}-wal")):
        with contextlib.suppress(OSError):
            status = path.stat()
            found += (status.st_ino, status.st_mtime_ns, status.st_size)
    return tuple(found)


def _is_needed(store: JobStore) -> bool:
    """Whether there are active jobs; a store that is busy may well have some."""
    try:
        return store.count(states=ACTIVE) > 0
    except StoreBusyError:
        return True


def main() -> None:
    """Serve the home given on the command line."""
    home = Home.at(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        # A job that came between the last look and the release of the lock found a scheduler and started none.
        while serve(home) and _is_needed(JobStore(home)):
            continue
    except QuantdeckError as error:
        log.error("%s", error)
        sys.exit(1)


if __name__ == "__main__":
    main()
