"""Who starts next: waiting jobs, free GPUs and CPU slots in, decisions out. A pure function, without any clock.

Jobs are looked at by priority, then by age. One that cannot start keeps what it waits for from those after it, so a
job that needs two GPUs is not overtaken for ever by jobs that need one. What nobody here can bring about (a GPU that
is not there, memory that another program holds) keeps nothing: the wait may be endless.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from backend.jobs.devices import Gpu, foreign_use, gpu_numbers
from backend.jobs.store import Job


@dataclass(frozen=True)
class Decision:
    """What becomes of a waiting job: it gets `resources`, or it waits for `reason`."""

    job: Job
    resources: tuple[str, ...] = ()
    reason: str | None = None


def plan(waiting: Sequence[Job], used: Mapping[str, str], gpus: Sequence[Gpu], cpu_slots: int) -> list[Decision]:
    """Decide about every waiting job.

    Args:
        waiting: Queued jobs.
        used: Resource in use -> name of the job that has it.
        gpus: The GPUs of this machine.
        cpu_slots: How many jobs without a GPU may run at once.
    """
    taken, kept = dict(used), dict[str, str]()
    by_number = {gpu.index: gpu for gpu in gpus}
    decisions = []
    for job in sorted(waiting, key=lambda job: (-job.priority, job.uid)):
        on_cpu = job.device == "cpu"
        decision = _on_cpu(job, taken, cpu_slots) if on_cpu else _on_gpus(job, taken, kept, by_number)
        for resource in decision.resources:
            taken[resource] = job.job_id
        decisions.append(decision)
    return decisions


def _on_cpu(job: Job, taken: Mapping[str, str], slots: int) -> Decision:
    free = next((slot for slot in map("cpu:{}".format, range(slots)) if slot not in taken), None)
    busy = sum(resource.startswith("cpu:") for resource in taken)
    if free is not None and busy < slots:
        return Decision(job, (free,))
    if slots == 1 and "cpu:0" in taken:
        return Decision(job, reason=f"waiting: job {taken['cpu:0']} uses the CPU")
    return Decision(job, reason=f"waiting: {busy} of {slots} CPU slots are busy")


def _on_gpus(job: Job, taken: Mapping[str, str], kept: dict[str, str], by_number: Mapping[int, Gpu]) -> Decision:
    numbers = gpu_numbers(job.device)
    for number in numbers:
        if number not in by_number:
            there = ", ".join(map(str, sorted(by_number))) or "none"
            return Decision(job, reason=f"waiting: GPU {number} is not there (this machine has: {there})")
    wanted = [by_number[number] for number in numbers]
    for gpu in wanted:
        if f"gpu:{gpu.uuid}" not in taken and (foreign := foreign_use(gpu)):
            return Decision(job, reason=f"waiting: {foreign}")
    reason = None
    for gpu in wanted:
        resource = f"gpu:{gpu.uuid}"
        if resource in taken:
            reason = f"waiting: job {taken[resource]} uses GPU {gpu.index}"
            break
        if resource in kept:
            reason = f"waiting: job {kept[resource]} is before it in the queue for GPU {gpu.index}"
            break
    if reason is None:
        return Decision(job, tuple(f"gpu:{gpu.uuid}" for gpu in wanted))
    for gpu in wanted:
        kept.setdefault(f"gpu:{gpu.uuid}", job.job_id)
    return Decision(job, reason=reason)
