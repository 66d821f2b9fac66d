"""What the buttons of jobs do: of one job, and of all that are selected.

Of several jobs each is done by itself; the answer tells how many were done, and of every other one why it was not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr

from backend.errors import JobError
from backend.jobs import control, deletion, removal
from backend.jobs.store import Job, JobStore, StoreBusyError
from backend.paths import Home
from ui.format import size
from ui.jobslist import PER_PAGE
from ui.layout import action, notice

UID = re.compile(r"[0-9a-f]{22}")
MAX_REASONS = 5
OF_MANY = ("cancel", "delete", "restore", "ask-erase", "erase")
"""What can be done with several jobs at once."""


def act_on(home: Home, act: str, uid: str, *, actor: str = "user") -> str:
    """Do what a button of a job's row or page stands for; returns what to say.

    Raises:
        QuantdeckError: If there is no such action or job, or the job's state does not allow it any more.
    """
    if not uid:
        raise JobError("the page did not say which job is meant; reload it")
    if act == "cancel":
        job = control.cancel(home, uid, actor=actor)
        return f"Job {job.job_id} " + ("was cancelled" if job.state == "cancelled" else "is being stopped")
    if act == "resume":
        job = control.resume(home, uid, actor=actor)
        return f"Job {job.job_id} goes on where it stopped (attempt {job.attempt})"
    if act == "measure":
        job = control.resume(home, uid, redo="measure", actor=actor)
        return f"Job {job.job_id} is measured again (attempt {job.attempt})"
    if act == "delete":
        return f"Job {deletion.delete(home, uid, actor=actor).job_id} was deleted"
    if act == "restore":
        return f"Job {deletion.restore(home, uid, actor=actor).job_id} was restored"
    raise JobError(f"there is no action {act[:40]!r}")


def chosen(event: gr.EventData, uid: str) -> list[str]:
    """The ids that came with a click on a button for several jobs: those of the selection, else the one of its row.

    Args:
        event: The click, from whoever.
        uid: What `reading.asked` took from it.
    """
    data: Any = getattr(event, "_data", None)
    text = data.get("uids") if isinstance(data, dict) else None
    given = text.split() if isinstance(text, str) and len(text) <= PER_PAGE * 30 else []
    return [one for one in dict.fromkeys(given or [uid]) if UID.fullmatch(one)][:PER_PAGE]


@dataclass
class Done:
    """What became of several jobs.

    Attributes:
        jobs: Those that it was done with.
        refused: Why not, of each other one.
    """

    jobs: list[Job] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def each(uids: Sequence[str], do: Callable[[str], Job]) -> Done:
    """Do something with each job; a store that is busy ends it, since every further one would wait as long."""
    done = Done()
    for number, uid in enumerate(uids):
        try:
            done.jobs.append(do(uid))
        except StoreBusyError as error:
            done.refused += [error.message] * (len(uids) - number)
            break
        except JobError as error:
            done.refused.append(error.message)
    return done


def act_on_many(home: Home, act: str, uids: Sequence[str], *, actor: str = "user") -> str:
    """Do what a button for several jobs stands for.

    Args:
        home: The home.
        act: One of `OF_MANY`.
        uids: The jobs.
        actor: Who asks, for the jobs' history.

    Returns:
        A notice: how many were done and why others were not, with the way back where there is one.

    Raises:
        JobError: If no job was named.
    """
    if not uids:
        raise JobError("the page did not say which jobs are meant; reload it")
    if act == "ask-erase":
        return _ask_erase(home, uids)
    if act == "erase":
        return _erase(home, uids, actor)
    calls = {"cancel": control.cancel, "delete": deletion.delete, "restore": deletion.restore}
    done = each(uids, lambda uid: calls[act](home, uid, actor=actor))
    if act == "cancel":
        over, going = ([job for job in done.jobs if (job.state == "cancelled") is ended] for ended in (True, False))
        parts = [_said(over, "was", "cancelled"), _said(going, "is", "being stopped", small=bool(over))]
        return _told(done, " and ".join(part for part in parts if part))
    if act == "restore":
        return _told(done, _said(done.jobs, "was", "restored"))
    undo = action("Undo", "restore", "", uids=[job.uid for job in done.jobs])
    text = "Its files stay until you delete it for good, under Deleted."
    if len(done.jobs) != 1:
        text = "Their files stay until you delete them for good, under Deleted."
    return _told(done, _said(done.jobs, "was", "deleted"), text, undo)


def _ask_erase(home: Home, uids: Sequence[str]) -> str:
    """What deleting for good would free, and the question."""
    store, free = JobStore(home), 0

    def weigh(uid: str) -> Job:
        nonlocal free
        free += deletion.size(home, uid)
        return store.get_deleted(uid)

    done = each(uids, weigh)
    if not done.jobs:
        return _told(done, "")
    model = "its model, log and working folder are" if len(done.jobs) == 1 else "their models, logs and folders are"
    buttons = action("Delete for good", "erase", "", uids=[job.uid for job in done.jobs], kind="danger")
    buttons += action("Keep", "dismiss", "")
    heading = f"Delete {_named(done.jobs, small=True)} for good? {size(free)} become free"
    return notice("warn", heading, _reasons(f"{model.capitalize()} removed. There is no way back.", done), buttons)


def _erase(home: Home, uids: Sequence[str], actor: str) -> str:
    store, used, free = JobStore(home), removal.used_files(home.root), 0

    def erase(uid: str) -> Job:
        nonlocal free
        job = store.get_deleted(uid)
        free += deletion.erase(home, uid, actor=actor, used=used)
        return job

    done = each(uids, erase)
    return _told(done, _said(done.jobs, "was", "deleted for good"), f"{size(free)} became free.")


def _told(done: Done, heading: str, text: str = "", buttons: str = "") -> str:
    if not done.jobs:
        return notice("error", "Nothing was changed", _reasons("", done))
    return notice("warn" if done.refused else "good", heading, _reasons(text, done), buttons)


def _reasons(text: str, done: Done) -> str:
    reasons = list(dict.fromkeys(done.refused))
    lines = [text] if text else []
    if done.jobs and done.refused:
        lines.append(f"{len(done.refused)} {'was' if len(done.refused) == 1 else 'were'} not:")
    lines += [reason[:1].upper() + reason[1:] + "." for reason in reasons[:MAX_REASONS]]
    if len(reasons) > MAX_REASONS:
        lines.append(f"and {len(reasons) - MAX_REASONS} more reasons like these.")
    return "\n".join(lines)


def _named(jobs: Sequence[Job], *, small: bool = False) -> str:
    words = f"Job {jobs[0].job_id}" if len(jobs) == 1 else f"{len(jobs)} jobs"
    return words[:1].lower() + words[1:] if small else words


def _said(jobs: Sequence[Job], verb: str, what: str, *, small: bool = False) -> str:
    """`Job a was deleted`, `3 jobs were deleted`; nothing for no job."""
    plural = {"was": "were", "is": "are"}[verb]
    return f"{_named(jobs, small=small)} {verb if len(jobs) == 1 else plural} {what}" if jobs else ""
