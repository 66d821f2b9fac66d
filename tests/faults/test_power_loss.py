"""The job store when the power is lost at any moment (fault 6): no acknowledged end of a job is."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from random import Random

from backend.jobs.store import JobStore
from backend.paths import PROJECT, Home
from tests.jobs.stored import make

JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


def python(code, *args, **more):
    """Another process with this code."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], cwd=PROJECT, text=True, **more)


WRITER = """
import sys
from backend.jobs import database
if sys.argv[2] == "wal":
    database.journal_for = lambda folder: "wal"
from backend.jobs.store import JobStore
from backend.paths import Home
from tests.jobs.stored import make, start
store = JobStore(Home.at(sys.argv[1]))
with database.opened(store.home) as keeps_the_wal_open:
    for number in range(100_000):
        job = make(store, f"j{number}")
        start(store, job, "cpu:0")
        store.update(job.uid, 1, result={"rows": ["x" * 3000]})
        final = ("succeeded", "failed")[number % 2]
        store.move(job.uid, final, actor="runner", attempt=1)
        print(job.uid, final, flush=True)
"""


class Copies:
    """Copies of a database that a process is writing, each with what had been acknowledged by then.

    The writer is stopped for a copy, as a power loss stops it at an arbitrary point.
    """

    def __init__(self, home: Home, journal: str) -> None:
        self.home, self.acknowledged = home, []
        self.writer = python(WRITER, home.root, journal, stdout=subprocess.PIPE)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + 60
        while not self.acknowledged:
            assert time.monotonic() < deadline and self.writer.poll() is None
            time.sleep(0.01)

    def _read(self):
        for line in self.writer.stdout:
            self.acknowledged.append(tuple(line.split()))

    def take(self, number: int) -> tuple[Home, list[tuple[str, str]]]:
        acknowledged = list(self.acknowledged)  # before the stop: all of this is certainly on the disk
        self.writer.send_signal(signal.SIGSTOP)
        os.waitpid(self.writer.pid, os.WUNTRACED)
        copy = Home(self.home.root.parent / f"copy{number}")
        copy.private.mkdir(parents=True)
        for suffix in ("", "-journal", "-wal"):
            source = self.home.root / f"jobs.db{suffix}"
            if source.exists():
                shutil.copy(source, copy.root / source.name)
        (copy.private / "store.lock").write_text("made")
        self.writer.send_signal(signal.SIGCONT)
        return copy, acknowledged

    def end(self):
        self.writer.kill()
        self.writer.wait()


def garble(path, begin, random, most=4096):
    """Replace what stands from `begin` on: by noise, by nothing (cut off), or by noise that is longer."""
    size = path.stat().st_size
    if begin > size:
        return
    at = random.randint(begin, size)
    with open(path, "rb+") as file:
        if random.random() < 0.4:
            file.truncate(at)
        else:
            file.seek(at)
            file.write(random.randbytes(random.randint(1, most)))


def power_lost_with_a_journal(copy, random):
    """What a loss of power may leave: bytes that were never synced may be anything.

    A journal counts once its header has been synced with the number of pages that it holds; from then on the pages
    in the database that it holds may be torn. Before, the database is untouched and the journal may be noise.

    Returns:
        What was found: "none", "unsynced" or "hot".
    """
    journal, db = copy.root / "jobs.db-journal", copy.root / "jobs.db"
    if not journal.exists() or journal.stat().st_size < 512:
        return "none"
    raw = journal.read_bytes()
    magic, count, _, _, sector, page = struct.unpack(">8sIIIII", raw[:28])
    if magic != JOURNAL_MAGIC or count == 0:
        garble(journal, 12 if count == 0 and magic == JOURNAL_MAGIC else 0, random)
        return "unsynced"
    with open(db, "rb+") as file:
        for number in range(count):
            (page_number,) = struct.unpack_from(">I", raw, sector + number * (page + 8))
            if random.random() < 0.7:
                file.seek((page_number - 1) * page + random.choice((0, page // 2)))
                file.write(random.randbytes(page // 2))
    garble(journal, sector + count * (page + 8), random)
    return "hot"


def all_acknowledged_is_there(copy, acknowledged):
    store = JobStore(copy)
    assert store.check() == []
    found = {job.uid: job.state for job in store.summaries(limit=1_000_000)}
    for uid, state in acknowledged:
        assert found[uid] == state
    make(store, "afterwards")  # it can be written to
    assert store.check() == []


def test_power_loss_at_any_point_loses_no_acknowledged_end_of_a_job(home):
    random, found = Random(1), []
    copies = Copies(home, "delete")
    try:
        for number in range(150):
            time.sleep(random.random() * 0.02)
            copy, acknowledged = copies.take(number)
            found.append(power_lost_with_a_journal(copy, random))
            all_acknowledged_is_there(copy, acknowledged)
            shutil.rmtree(copy.root)
            if number > 60 and found.count("hot") > 5:
                break
    finally:
        copies.end()
    assert found.count("hot") > 5 and len(copies.acknowledged) > 10, found


def test_a_torn_wal_loses_no_acknowledged_end_of_a_job(home):
    """Where the SQLite allows a WAL: whatever came after the last acknowledged commit may be anything."""
    random = Random(2)
    copies = Copies(home, "wal")
    torn = 0
    try:
        for number in range(40):
            wal = home.root / "jobs.db-wal"
            acknowledged, synced = list(copies.acknowledged), committed_bytes(wal)
            time.sleep(random.random() * 0.05)
            copy, _ = copies.take(number)
            if (copy.root / wal.name).stat().st_size > synced:
                torn += 1
                garble(copy.root / wal.name, synced, random)
            all_acknowledged_is_there(copy, acknowledged)
            shutil.rmtree(copy.root)
            if wal.stat().st_size > 3_500_000:  # before it is written from its beginning again
                break
    finally:
        copies.end()
    assert torn > 5


def committed_bytes(wal):
    """The part of a WAL that holds whole commits, in bytes."""
    raw = wal.read_bytes()
    size = len(raw)
    page = struct.unpack_from(">I", raw, 8)[0]
    at, committed = 32, 32
    while at + 24 + page <= size:
        if struct.unpack_from(">I", raw, at + 4)[0]:  # a frame that ends a transaction
            committed = at + 24 + page
        at += 24 + page
    return committed
