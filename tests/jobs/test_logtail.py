"""Following a log loses and doubles nothing, whatever happens to its files meanwhile."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from backend.jobs.logs import files as files_module
from backend.jobs.logs import search as search_module
from backend.jobs.logs import tail as tail_module
from backend.jobs.logs.cursors import File
from backend.jobs.logs.files import numbered, parts, read_all, rotated, size
from backend.jobs.logs.search import Match, find
from backend.jobs.logs.tail import GONE, tail
from backend.jobs.logs.writer import LogWriter
from backend.settings import JobSettings


@dataclass
class Small:
    log_bytes: int = 4096
    log_files: int = 4
    line_bytes: int = 512


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.log"


@pytest.fixture(autouse=True)
def forget():
    """Each test is a new process as far as the shared cache goes."""
    tail_module._logs.clear()
    yield
    tail_module._logs.clear()


def follow_all(path, cursor, **kwargs):
    lines = []
    while True:
        new, cursor = tail(path, cursor, **kwargs)
        if not new:
            return lines, cursor
        lines += new


def test_a_log_that_does_not_exist_yet_is_followed_from_its_first_line(path):
    lines, cursor = tail(path)
    assert lines == []
    assert tail(path, cursor) == ([], cursor)
    with LogWriter(path, Small()) as writer:
        for n in range(300):
            writer.line(f"line {n}")
    lines, cursor = tail(path, cursor)
    assert lines == [f"line {n}" for n in range(300)]
    assert tail(path, cursor) == ([], cursor)


def test_only_whole_lines_are_handed_out(path):
    path.write_bytes(b"one\ntwo\nthr")
    lines, cursor = tail(path)
    assert lines == ["one", "two"]
    with open(path, "ab") as file:
        file.write("ee\n\xe4\n".encode("latin-1"))
    assert tail(path, cursor)[0] == ["three", "\ufffd"]


def test_a_first_look_shows_the_end_from_the_beginning_of_a_line(path, monkeypatch):
    monkeypatch.setattr(tail_module, "START_BYTES", 1000)
    for n_bytes in (990, 1000, 1001, 1009, 5000):
        text = "".join(f"{n:08d}\n" for n in range(n_bytes // 9))
        path.write_text(text)
        tail_module._logs.clear()
        lines, _ = tail(path)
        assert lines == text.split("\n")[:-1][-len(lines) :]
        assert 1000 - 9 <= len(lines) * 9 <= 1000 or n_bytes < 1000


def test_a_first_look_right_after_a_rotation_shows_lines_of_the_file_before(path):
    with LogWriter(path, Small()) as writer:
        n = 0
        while not rotated(path):
            writer.line(f"line {n}")
            n += 1
    assert tail(path)[0] == [f"line {i}" for i in range(n)]


@pytest.mark.parametrize("every", [1, 7, 100, 700])
def test_following_over_rotations_loses_and_doubles_nothing(path, every):
    seen, cursor = [], tail(path)[1]
    with LogWriter(path, Small()) as writer:
        for n in range(2100):
            writer.line(f"line {n}")
            if n % every == every - 1:
                new, cursor = tail(path, cursor)
                seen += new
    seen += follow_all(path, cursor)[0]
    assert rotated(path) == [1, 2, 3]
    assert seen == [f"line {n}" for n in range(2100)]


@pytest.mark.parametrize("every", [50, 300])
def test_a_cursor_survives_rotations_and_the_readers_process(path, every):
    """A new reader each time, in small bites, from memory and from disk."""
    seen, cursor = [], tail(path)[1]
    with LogWriter(path, Small()) as writer:
        for n in range(2100):
            writer.line(f"line {n}")
            if n % every == 0:
                tail_module._logs.clear()
                new, cursor = follow_all(path, cursor, limit=1000)
                seen += new
    new, cursor = follow_all(path, cursor, limit=1000)
    seen += new
    assert seen == [f"line {n}" for n in range(2100)]
    code = (
        "from pathlib import Path; from backend.jobs.logs.tail import tail; "
        f"print(tail(Path({str(path)!r}), {cursor!r}))"
    )
    with LogWriter(path, Small()) as writer:
        writer.line("for the other process")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tail(path, cursor)) and "for the other process" in done.stdout


def test_lines_that_were_rotated_away_are_told(path):
    with LogWriter(path, Small()) as writer:
        writer.line("first")
        _, cursor = tail(path)
        for n in range(5000):
            writer.line(f"line {n}")
        for fresh in (False, True):
            if fresh:
                tail_module._logs.clear()
            lines, after = tail(path, cursor)
            assert lines[0] == GONE and lines[-1] == "line 4999"
            first = int(lines[1].split()[1])
            assert lines[1:] == [f"line {n}" for n in range(first, 5000)]
        assert tail(path, after) == ([], after)
        writer.line("next")
        assert tail(path, after)[0] == ["next"]


def test_a_file_with_the_inode_of_a_removed_one_is_not_taken_for_it(path):
    path.write_text("of an earlier job\n" * 10)
    _, cursor = tail(path)
    inode, offset, checksum = cursor.split("-")
    with open(path, "r+") as file:  # same inode, other content, longer
        file.truncate(0)
        file.write("of another job\n" * 50)
    assert f"{path.stat().st_ino:x}" == inode
    for fresh in (True, False):
        if fresh:
            tail_module._logs.clear()
        assert tail(path, cursor)[0] == [GONE, *["of another job"] * 50]


def test_a_log_that_was_deleted_and_begun_anew(path):
    path.write_text("old\n" * 10)
    _, cursor = tail(path)
    path.unlink()
    assert tail(path, cursor) == ([], cursor) and tail(path)[0] == []
    other = path.with_name("keeps-the-inode")
    other.write_text("")
    path.write_text("new\n")
    assert tail(path, cursor)[0] == [GONE, "new"]


@pytest.mark.parametrize(
    "cursor", ["", "x", "1-2", "1-2-3-4", "-1--1--1", "ffffffffffffffffffffff-0-0", "0-1-0", "a-b-c", "f" * 10**6]
)
def test_a_cursor_that_is_none_is_answered_with_the_end(path, cursor):
    path.write_text("one\ntwo\n")
    lines, after = tail(path, cursor)
    assert lines == [GONE, "one", "two"] and tail(path, after) == ([], after)


def test_memory_is_bounded_and_old_places_are_read_from_disk(path, monkeypatch):
    monkeypatch.setattr(tail_module, "CACHED_BYTES", 20_000)
    limits = Small(log_bytes=30_000)
    _, start = tail(path)
    _, follower = tail(path)
    seen = []
    with LogWriter(path, limits) as writer:
        for n in range(5000):
            writer.line(f"line {n}")
            if n % 50 == 0:
                new, follower = tail(path, follower)
                seen += new
                assert sum(len(block.data) for block in tail_module._logs[path]._blocks) <= 40_000
        seen += tail(path, follower)[0]
    assert seen == [f"line {n}" for n in range(5000)]
    old, _ = follow_all(path, start, limit=7000)
    assert old == seen


def test_a_burst_larger_than_the_memory(path, monkeypatch):
    monkeypatch.setattr(tail_module, "CACHED_BYTES", 20_000)
    with LogWriter(path, JobSettings()) as writer:
        writer.line("first")
        _, cursor = tail(path)
        for n in range(20_000):
            writer.line(f"line {n}")
    seen, cursor = follow_all(path, cursor, limit=9000)
    assert seen == [f"line {n}" for n in range(20_000)]
    assert tail(path)[0][-1] == "line 19999"


def test_a_line_longer_than_the_limit_comes_in_pieces(path):
    path.write_bytes(b"x" * 250 + b"\nend\n")
    _, cursor = tail(path.with_name("none"))
    seen, _ = follow_all(path, cursor, limit=100)
    assert "".join(seen) == "x" * 250 + "end" and seen[-1] == "end"


def test_fifty_readers_of_a_growing_log_share_its_reads(path):
    """Each change of the file costs at most one read, however many follow; nobody misses a line."""
    n_lines, n_readers, changes = 3000, 50, 0
    ready, done = threading.Barrier(n_readers + 1), threading.Event()
    results: list[list[str]] = [[] for _ in range(n_readers)]
    _, beginning = tail(path)

    def read(index):
        cursor = beginning
        ready.wait()
        while True:
            last = done.is_set()
            lines, cursor = tail(path, cursor)
            results[index] += lines
            if last:
                return
            time.sleep(0.02)

    threads = [threading.Thread(target=read, args=(index,)) for index in range(n_readers)]
    for thread in threads:
        thread.start()
    with LogWriter(path, Small(log_bytes=20_000, log_files=8)) as writer:
        ready.wait()
        for n in range(0, n_lines, 10):
            writer.write("".join(f"line {i}\n" for i in range(n, n + 10)))
            changes += 1
            time.sleep(0.002)
    done.set()
    for thread in threads:
        thread.join()
    expected = [f"line {n}" for n in range(n_lines)]
    assert all(result == expected for result in results)
    changes += len(rotated(path))  # a rotation is a change too
    assert tail_module._logs[path].reads <= changes + 1
    before = tail_module._logs[path].reads
    for _ in range(100):
        tail(path, beginning)
    assert tail_module._logs[path].reads == before


def test_readers_in_another_process_while_it_is_rotated(path):
    """The writer's process rotates several times between two looks of this one."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom types import SimpleNamespace as N\n"
        "from backend.jobs.logs.writer import LogWriter\n"
        f"w = LogWriter(Path({str(path)!r}), N(log_bytes=50_000, log_files=30, line_bytes=512))\n"
        "for n in range(60_000):\n"
        "    w.write(f'line {n}\\n')\n"
        "w.close()\n"
    )
    _, cursor = tail(path)
    seen: list[str] = []
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None:
        new, cursor = tail(path, cursor)
        seen += new
    seen += follow_all(path, cursor)[0]
    assert process.returncode == 0 and len(rotated(path)) > 5
    assert GONE not in seen
    assert seen == [f"line {n}" for n in range(60_000)]


def test_the_files_in_order_and_all_of_them(path):
    with LogWriter(path, Small()) as writer:
        for n in range(2000):
            writer.line(f"line {n}")
    assert parts(path) == [numbered(path, 3), numbered(path, 2), numbered(path, 1), path]
    assert size(path) == sum(file.stat().st_size for file in parts(path))
    lines = b"".join(read_all(path, chunk=100)).decode().splitlines()
    first = int(next(line for line in lines if line.startswith("line")).split()[1])
    assert [line for line in lines if line.startswith("line")] == [f"line {n}" for n in range(first, 2000)]
    assert sum("of the log, begun" in line for line in lines) <= 1  # of the oldest, which tells that more is missing
    assert parts(path.with_name("none")) == [] and size(path.with_name("none")) == 0
    assert list(read_all(path.with_name("none"))) == []


def test_a_download_goes_on_while_the_log_is_rotated(path):
    with LogWriter(path, Small(log_files=3)) as writer:
        for n in range(1200):
            writer.line(f"line {n}")
        expected = b"".join(read_all(path))
        pieces = read_all(path, chunk=64)
        got = [next(pieces)]
        for n in range(5000):
            writer.line(f"later {n}")
        got += list(pieces)
    assert b"".join(got) == expected


def test_find_looks_through_all_files_oldest_first(path):
    with LogWriter(path, Small()) as writer:
        for n in range(1200):
            writer.line(f"line {n}")
            if n % 400 == 399:
                writer.line(f"ERROR (at {n}) [.*]")
    found = find(path, "error (at")
    assert [match.text for match in found] == [f"ERROR (at {n}) [.*]" for n in (399, 799, 1199)]
    assert [match.part for match in found] == sorted((match.part for match in found), reverse=True)
    for match in found:
        assert numbered(path, match.part).read_text().splitlines()[match.number - 1] == match.text
    assert find(path, "error (at", ignore_case=False) == []
    assert find(path, "ERROR", ignore_case=False) == found and find(path, "[.*]") == found
    assert find(path, "line", limit=5) == find(path, "line")[:5] and len(find(path, "line")) == 200
    assert find(path, "") == [] == find(path, "no such text") == find(path.with_name("none"), "x")
    assert find(path, "part ") == []
    assert isinstance(found[0], Match)


@pytest.mark.parametrize("at_once", [64, 1000, 1 << 20])
@pytest.mark.parametrize("text", ["e", "Line 1", "9", "\u00e4 1", "\u00c4", "xyz", "1\nline 2"])
def test_find_finds_what_a_plain_search_finds(path, monkeypatch, text, at_once):
    monkeypatch.setattr(search_module, "SEARCHED_AT_ONCE", at_once)
    lines = [f"line {n}" if n % 3 else f"\u00e4 {n} e \u00c4" for n in range(300)]
    path.write_text("\n".join(lines) + "\nLine 1 without end")
    lines.append("Line 1 without end")
    for ignore_case in (True, False):
        folded = text.lower() if ignore_case else text
        expected = [
            Match(0, n, line) for n, line in enumerate(lines, 1) if folded in (line.lower() if ignore_case else line)
        ]
        assert find(path, text, 1000, ignore_case=ignore_case) == expected


def test_descriptors_are_given_back(path):
    before = len(os.listdir("/proc/self/fd"))
    _, cursor = tail(path)
    with LogWriter(path, Small()) as writer:
        for n in range(1000):
            writer.line(f"line {n}")
            if n % 20 == 0:
                _, cursor = tail(path, cursor)
                find(path, "line", limit=1)
                next(read_all(path))
    tail(path, "1-2-3")
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_line_that_comes_while_the_beginning_is_read_makes_no_wrong_cursor(path, monkeypatch):
    """A cursor's checksum is of the first 128 bytes; they may be written between two looks at a young file."""
    path.write_text("first\n")
    look_at = File.look_at

    def and_the_writer_goes_on(file, part):
        look_at(file, part)
        with open(path, "a") as log:
            log.write("x" * 200 + "\n")

    monkeypatch.setattr(File, "look_at", and_the_writer_goes_on)
    lines, cursor = tail(path)
    monkeypatch.undo()
    with open(path, "a") as log:
        log.write("last\n")
    rest, _ = tail(path, cursor)
    assert [*lines, *rest] == ["first", "x" * 200, "last"]


def test_two_rotations_while_the_files_are_opened_change_no_order(path, monkeypatch):
    with LogWriter(path, Small(log_files=30)) as writer:
        for n in range(300):
            writer.line(f"line {n}")
        once, turns = files_module.open_once, []

        def slowly(path, *, only_newest):
            real = os.open

            def then_two_rotations(*arguments):
                fd = real(*arguments)
                if not turns:
                    turns.append(len(rotated(path)))
                    while len(rotated(path)) < turns[0] + 2:
                        writer.line("x" * 100)
                return fd

            monkeypatch.setattr(os, "open", then_two_rotations)
            try:
                return once(path, only_newest=only_newest)
            finally:
                monkeypatch.setattr(os, "open", real)

        monkeypatch.setattr(files_module, "open_once", slowly)
        lines = b"".join(read_all(path)).decode().splitlines()
    kept = [int(line.split()[1]) for line in lines if line.startswith("line ")]
    assert turns and kept == sorted(kept) and lines[-1] == "x" * 100


def test_a_link_in_place_of_a_log_shows_nothing(path, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("not for the page\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(secret)
    assert tail(path)[0] == [] and find(path, "page") == [] and b"".join(read_all(path)) == b""
    path.unlink()
    with LogWriter(path, Small()) as writer:
        writer.line("ours")
    numbered(path, 1).symlink_to(secret)
    assert tail(path)[0] == ["ours"] and find(path, "page") == [] and b"".join(read_all(path)) == b"ours\n"
