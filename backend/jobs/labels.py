"""Tags and a note of a job: what people write beside it, to find it again among many."""

from __future__ import annotations

import re
from collections.abc import Iterable

from backend.errors import ConfigError, JobError
from backend.jobs.job import Job
from backend.jobs.redact import redact
from backend.jobs.store import JobStore
from backend.paths import Home

MAX_TAG = 32
MAX_TAGS = 12
MAX_NOTE = 2000
TAG = re.compile(rf"[a-z0-9][a-z0-9._-]{{0,{MAX_TAG - 1}}}")
ALLOWED = f"letters a to z, digits, '.', '_' and '-', beginning with a letter or digit, at most {MAX_TAG} characters"

# Everything below a space but tab and line feed, and half characters, which the store cannot keep.
_NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def read_tags(words: str | Iterable[str]) -> tuple[str, ...]:
    """Tags as they are stored: small letters, each once, sorted.

    Args:
        words: Tags, or a text of them with spaces or commas between.

    Raises:
        ConfigError: If one is no tag, or there are too many.
    """
    given = re.split(r"[\s,]+", words) if isinstance(words, str) else list(words)
    tags = sorted({word.lower() for word in given if word})
    for tag in tags:
        if not TAG.fullmatch(tag):
            shown = tag if len(tag) <= 60 else f"{tag[:60]}..."
            raise ConfigError(f"found {shown!r}; a tag is one word of {ALLOWED}", key="tags", value=tag)
    if len(tags) > MAX_TAGS:
        raise ConfigError(f"found {len(tags)} tags; a job has at most {MAX_TAGS}", key="tags", value=tags)
    return tuple(tags)


def read_note(text: str) -> str:
    """A note as it is stored: plain text without secrets and without spaces around it.

    Raises:
        ConfigError: If it is too long, or holds control characters.
    """
    note = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if len(note) > MAX_NOTE:
        raise ConfigError(f"found {len(note):,} characters; a note has at most {MAX_NOTE:,}", key="note")
    if found := _NO_TEXT.search(note):
        raise ConfigError(f"found {found[0]!r} at character {found.start() + 1}; a note is plain text", key="note")
    return redact(note)


def change(
    home: Home,
    uid: str,
    *,
    tags: str | Iterable[str] | None = None,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
    note: str | None = None,
) -> Job:
    """Change the tags and the note of a job, in whatever state it is; what is not given stays.

    Args:
        home: The home.
        uid: The job, by uid or name.
        tags: All its tags from now on.
        add: Tags it gets besides those it has, or those of `tags`.
        remove: Tags it loses; one that it does not have is no mistake.
        note: Its note from now on; empty for none.

    Returns:
        The job as it is now.

    Raises:
        ConfigError: If a tag or the note is not allowed; nothing is changed then.
        JobError: If there is no such job.
    """
    more, less = read_tags(add), set(read_tags(remove))
    wanted = None if tags is None else read_tags(tags)
    text = None if note is None else read_note(note)
    store = JobStore(home)
    job = store.get(uid)
    with store.writing() as db:
        row = db.query("SELECT tags, note FROM jobs WHERE uid = ? AND erased IS NULL", [job.uid])
        if not row:
            raise JobError(f"job {job.job_id} was deleted for good just now")
        kept = row[0]["tags"].split() if wanted is None else wanted
        together = read_tags({*kept, *more} - less)
        db.execute(
            "UPDATE jobs SET tags = ?, note = ? WHERE uid = ?",
            [" ".join(together), row[0]["note"] if text is None else text, job.uid],
        )
    return store.get(job.uid)
