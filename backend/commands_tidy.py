"""The commands that keep many jobs in order: tags and notes, deleting and restoring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from backend.disk import amount
from backend.errors import ConfigError, JobError
from backend.jobs import deletion, labels, removal
from backend.jobs.store import Job, JobStore
from backend.paths import Home

Handler = Callable[[argparse.Namespace, Home], int]


def add_commands(add: Callable[[str, Handler, str], argparse.ArgumentParser]) -> None:
    """Adds these commands and their options to the command line."""
    tagging = add("tag", tag, "show or change the tags and the note of a job")
    tagging.add_argument("job_id")
    tagging.add_argument("--add", nargs="+", default=[], metavar="TAG", help="tags that the job gets")
    tagging.add_argument("--remove", nargs="+", default=[], metavar="TAG", help="tags that it loses")
    tagging.add_argument("--note", metavar="TEXT", help=f"its note, at most {labels.MAX_NOTE} characters; '' for none")
    deleting = add("delete", delete, "take jobs that are over out of the list; they can be restored")
    deleting.add_argument("job_id", nargs="+")
    deleting.add_argument("--for-good", action="store_true", help="also remove their models, logs and working folders")
    deleting.add_argument("--yes", action="store_true", help="with --for-good: do not ask")
    restoring = add("restore", restore, "put deleted jobs back into the list")
    restoring.add_argument("job_id", nargs="+")


def tag(args: argparse.Namespace, home: Home) -> int:
    """Show or change the tags and the note of a job."""
    job = JobStore(home).get(args.job_id)
    if args.add or args.remove or args.note is not None:
        job = labels.change(home, job.uid, add=args.add, remove=args.remove, note=args.note)
    print(f"job {job.job_id}: {' '.join(job.tags) or 'no tags'}")
    if job.note:
        print(job.note)
    return 0


def delete(args: argparse.Namespace, home: Home) -> int:
    """Take jobs out of the list, or remove them for good."""
    if args.yes and not args.for_good:
        raise ConfigError("--yes goes with --for-good; deleting alone asks nothing", key="--yes")
    if not args.for_good:
        return _each(args.job_id, lambda name: f"job {deletion.delete(home, name).job_id}: deleted")
    jobs = [_to_erase(home, name) for name in args.job_id]
    free = sum(_size(home, job) for job in jobs)
    if not args.yes and not _agreed(f"Delete {_several(jobs)} for good? {amount(free)} become free."):
        print("nothing was deleted", file=sys.stderr)
        return 1
    used = removal.used_files(home.root)

    def erase(uid: str) -> str:
        job = _to_erase(home, uid)
        if not job.deleted_at:
            deletion.delete(home, uid)
        return f"job {job.job_id}: deleted for good, {amount(deletion.erase(home, uid, used=used))} are free"

    return _each([job.uid for job in jobs], erase)


def restore(args: argparse.Namespace, home: Home) -> int:
    """Put deleted jobs back into the list."""
    return _each(args.job_id, lambda name: f"job {deletion.restore(home, name).job_id}: restored")


def _to_erase(home: Home, name: str) -> Job:
    """The job of this name or uid in the list, else the deleted one."""
    store = JobStore(home)
    try:
        job = store.get(name)
    except JobError:
        return store.get_deleted(name)
    if job.is_active:
        raise JobError(f"job {job.job_id} is {job.state}; cancel it first, and delete it when it has ended")
    return job


def _size(home: Home, job: Job) -> int:
    return sum(removal.bytes_of(home.root, path) for path in deletion.places(home, job))


def _each(names: list[str], do: Callable[[str], str]) -> int:
    """Do it for each job, whether or not it can be done for those before; returns the exit code."""
    failed = 0
    for name in names:
        try:
            print(do(name))
        except JobError as error:
            print(f"error: {error.message}", file=sys.stderr)
            failed = 1
    return failed


def _agreed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise ConfigError("nobody can be asked here; give --yes to delete for good without a question", key="--yes")
    return input(f"{question} There is no way back. [y/N] ").strip().lower() in ("y", "yes")


def _several(jobs: list[Job]) -> str:
    return f"job {jobs[0].job_id}" if len(jobs) == 1 else f"{len(jobs)} jobs"
