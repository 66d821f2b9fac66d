"""Whatever a program prints, the log is whole lines of plain text of bounded size, without secrets."""

import errno
import logging
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest

from backend.jobs.logs import lines as lines_module
from backend.jobs.logs import writer as writer_module
from backend.jobs.logs.files import PART_LINE, numbered, parts, rotated
from backend.jobs.logs.pump import LogPump
from backend.jobs.logs.writer import LogHandler, LogWriter
from backend.settings import JobSettings

TOKEN = "hf_" + "QdTestTokenNotReal0123456789abcdef"  # made up


@dataclass
class Small:
    log_bytes: int = 4096
    log_files: int = 4
    line_bytes: int = 512


@pytest.fixture
def path(tmp_path):
    return tmp_path / "logs" / "log.log"


def written(path, *pieces, limits=None):
    """The log's lines after a program wrote these pieces."""
    with LogWriter(path, limits or JobSettings()) as writer:
        for piece in pieces:
            writer.write(piece)
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def all_text(path):
    return b"".join(file.read_bytes() for file in parts(path))


def test_lines_are_written_when_they_are_whole(path):
    with LogWriter(path, JobSettings()) as writer:
        writer.write(b"one\ntw")
        assert path.read_bytes() == b"one\n"
        writer.write(b"o\nthree")
        assert path.read_bytes() == b"one\ntwo\n"
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_every_way_of_cutting_the_same_bytes_gives_the_same_log(tmp_path):
    data = "ä 1\r\n\x1b[31mrot\x1b[0m\nhf_{}\n\n  x\u2028y\n".format("a" * 30).encode() + b"\xff\x00z\r\nlast"
    whole = written(tmp_path / "whole.log", data)
    assert whole == ["ä 1", "rot", "[redacted]", "", "  x y", "\ufffdz", "last"]
    for n in range(1, 20):
        pieces = [data[i : i + n] for i in range(0, len(data), n)]
        assert written(tmp_path / f"{n}.log", *pieces) == whole, n


def test_a_progress_bar_leaves_its_last_state(path):
    bar = "".join(f"\r{n:3d}% |{'#' * (n // 10):10}|" for n in range(101))
    assert written(path, f"begin\n{bar}\nend\n") == ["begin", "100% |##########|", "end"]


def test_a_progress_bar_in_many_writes_shows_once_a_second(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now[0])
    with LogWriter(path, JobSettings()) as writer:
        for n in range(100):  # ten seconds
            writer.write(f"\rstep {n}")
            now[0] += 0.1
        writer.write("\rstep 100\nnext\n")
    lines = path.read_text().splitlines()
    assert lines[-2:] == ["step 100", "next"]
    assert 8 <= len(lines) <= 14 and len(set(lines)) == len(lines)


def test_a_bar_that_clears_itself_leaves_no_empty_line(path):
    assert written(path, b"\r50%\r100%\r    \r\n\nafter\n") == ["100%", "", "after"]


def test_a_bar_that_was_shown_is_not_shown_again_at_its_end(path):
    assert written(path, b"100%\r", b"\n", b"next\n") == ["100%", "next"]


def test_a_line_that_is_too_long_is_cut_and_says_so(path):
    lines = written(path, b"a" * 100_000, b"b" * 100_000 + b"\nnext\n")
    kept, cut = lines[0].split(" ... [")
    assert set(kept) == {"a"} and 8192 <= len(kept) <= 16384
    assert len(kept) + int(cut.split()[0]) == 200_000
    assert lines[1] == "next"


def test_a_cut_never_leaves_half_a_character(path):
    lines = written(path, "ü" * 10_000 + "\n", limits=Small(log_bytes=1 << 20, line_bytes=1001))
    assert lines[0].startswith("ü" * 500 + " ... [") and "\ufffd" not in lines[0]


def test_control_characters_and_direction_marks_do_not_reach_the_file(path):
    text = "a\x00b\x07c\x1b[2Kd\x1b]0;title\x07e\x1b]8;;http://x\x1b\\f\u202eg\u2066h\x9bi\x7fj\tk\x1b"
    assert written(path, text + "\n") == ["abcdefghij\tk"]


def test_rotation_bounds_the_disk_and_keeps_the_newest_lines(path):
    limits = Small()
    with LogWriter(path, limits) as writer:
        for n in range(2000):
            writer.line(f"line {n}")
            sizes = [file.stat().st_size for file in parts(path)]
            assert len(sizes) <= limits.log_files and max(sizes) <= limits.log_bytes
    assert rotated(path) == [1, 2, 3]
    lines = [line for line in all_text(path).decode().splitlines() if not PART_LINE.match(line)]
    first = int(lines[0].split()[1])
    assert lines == [f"line {n}" for n in range(first, 2000)]
    assert first < 2000 - limits.log_files * 100


def test_fewer_files_than_before_are_kept_after_the_setting_changed(path):
    for log_files, expected in ((4, [1, 2, 3]), (2, [1]), (1, [])):
        with LogWriter(path, Small(log_files=log_files)) as writer:
            for n in range(2000):
                writer.line(f"line {n}")
        assert rotated(path) == expected
        assert path.stat().st_size <= 4096


def test_a_log_is_continued_by_the_next_writer(path):
    with LogWriter(path, Small()) as writer:
        for n in range(1000):
            writer.line(f"first {n}")
    part = int(PART_LINE.match(path.read_text().splitlines()[0]).group(1))
    with open(path, "ab") as file:
        file.write(b"torn by kill -9")
    with LogWriter(path, Small()) as writer:
        writer.line("goes on")
        assert path.read_text().splitlines()[-2:] == ["torn by kill -9", "goes on"]
        for n in range(1000):
            writer.line(f"second {n}")
    assert int(PART_LINE.match(path.read_text().splitlines()[0]).group(1)) > part


def test_other_files_in_the_folder_are_left_alone(path):
    path.parent.mkdir(parents=True)
    others = [path.parent / name for name in ("log.log.old", "log.log.01", "log.log.", "log.log.1.gz", "other.log.1")]
    for other in others:
        other.write_text("mine")
    with LogWriter(path, Small(log_files=2)) as writer:
        for n in range(2000):
            writer.line(f"line {n}")
    assert all(other.read_text() == "mine" for other in others)
    assert parts(path) == [numbered(path, 1), path]


def test_a_log_that_somebody_deleted_begins_anew(path, monkeypatch):
    monkeypatch.setattr(writer_module, "LOOK_EVERY_S", 0.0)
    with LogWriter(path, JobSettings()) as writer:
        writer.line("one")
        path.unlink()
        path.parent.rmdir()
        writer.line("two")
        assert path.read_text() == "two\n"


def test_threads_do_not_mix_their_lines(path):
    with LogWriter(path, JobSettings()) as writer:
        streams = [writer.stream() for _ in range(8)]

        def work(stream, letter):
            for n in range(300):
                for piece in (letter * 20, letter * 20, f" {n}\n"):
                    stream.feed(piece.encode())

        threads = [threading.Thread(target=work, args=(s, c)) for s, c in zip(streams, "abcdefgh", strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = path.read_text().splitlines()
    for letter in "abcdefgh":
        assert [line for line in lines if line[0] == letter] == [f"{letter * 40} {n}" for n in range(300)]


def test_a_spammer_is_slowed_down_in_the_log_and_its_last_lines_are_kept(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now[0])
    total = 0
    with LogWriter(path, JobSettings()) as writer:
        for _ in range(20):  # twenty seconds of 20,000 lines
            for _ in range(20):
                writer.write("".join(f"spam {total + n}\n" for n in range(1000)))
                total += 1000
                now[0] += 0.05
        writer.write("Traceback: the reason\n")
        writer.line("the runner's own line is not limited")
    lines = path.read_text().splitlines()
    left_out = [int(line.split("[")[1].split()[0]) for line in lines if "lines left out" in line]
    assert sum(left_out) + len([line for line in lines if "spam" in line]) == total
    assert len(lines) * lines_module.LINE_COST < lines_module.BURST_BYTES + 25 * lines_module.BYTES_PER_S
    assert "Traceback: the reason" in lines[-2:] and lines[0] == "spam 0"
    assert f"spam {total - 1}" in lines


def test_a_thousand_lines_a_second_are_not_left_out(path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(lines_module.time, "monotonic", lambda: now[0])
    with LogWriter(path, JobSettings()) as writer:
        for second in range(120):
            writer.write("".join(f"{second} {n} {'x' * 100}\n" for n in range(1000)))
            now[0] += 1.0
    assert len(path.read_text().splitlines()) == 120_000


def test_a_full_disk_stops_nothing_and_is_told_afterwards(path, monkeypatch):
    real = os.write

    def full(fd, data):
        if fd == writer._fd:
            real(fd, bytes(data)[: len(data) // 2])
            raise OSError(28, "No space left on device")
        return real(fd, data)

    with LogWriter(path, JobSettings()) as writer:
        writer.line("before")
        monkeypatch.setattr(writer_module.os, "write", full)
        for n in range(5):
            writer.line(f"lost {n}")
        monkeypatch.setattr(writer_module.os, "write", real)
        writer.line("after")
    assert path.read_text().splitlines() == [
        "before", "... [lines that could not be written, the disk was full: 5]", "after",
    ]  # fmt: skip


def test_a_disk_that_is_full_from_the_start_does_not_stop_the_job(path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    real = os.open
    monkeypatch.setattr(writer_module.os, "open", full)
    with LogWriter(path, JobSettings()) as writer:
        writer.line("lost")
        monkeypatch.setattr(writer_module.os, "open", real)
        writer.line("after")
    assert path.read_text().splitlines() == ["... [lines that could not be written, the disk was full: 1]", "after"]
    with pytest.raises(FileExistsError):
        LogWriter(path / "log.log", JobSettings())


def test_private_key_blocks_lose_their_body_and_what_follows_stays(path):
    body = [b"bm90cmVhbA" * 6 + b"abcd", b"bm90cmVhbA" * 6 + b"efgh", b"c2hvcnQ="]
    block = b"-----BEGIN RSA PRIVATE KEY-----\n" + b"\n".join(body) + b"\n-----END RSA PRIVATE KEY-----\n"
    lines = written(
        path, b"INFO: " + block + b"after\n", b"-----BEGIN PRIVATE KEY----- is missing in x.pem\nKeyError: 1\n"
    )
    assert lines == ["INFO: [private key redacted]", "after", "[private key redacted]", "KeyError: 1"]


def test_the_handler_writes_messages_with_their_traces_and_without_secrets(path):
    writer = LogWriter(path, JobSettings())
    logger = logging.Logger("quantdeck.test")
    logger.addHandler(LogHandler(writer))
    try:
        raise ValueError(f"bad answer for https://x.example/?token={TOKEN}")
    except ValueError:
        logger.exception("failed with %s", TOKEN)
    writer.close()
    text = path.read_text()
    assert "ERROR quantdeck.test: failed with [redacted]" in text and "Traceback" in text and TOKEN not in text
    assert text.endswith("\n") and "ValueError: bad answer" in text


def test_the_pump_takes_everything_until_the_end_of_the_pipe(path):
    with LogWriter(path, JobSettings()) as writer:
        reading, writing = os.pipe()
        pump = LogPump(reading, writer)
        os.write(writing, b"first\nlast without end")
        os.close(writing)
        assert pump.wait(30)
        assert pump.last(1) == ["last without end"]
        assert path.read_text() == "first\nlast without end\n"
        pump.stop()
        pump.stop()


def test_stop_takes_what_is_in_the_pipe_although_a_descendant_holds_it(path):
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid(); time.sleep(600)\n"
        "sys.stderr.write('x' * 30000 + '\\nthe end'); sys.stderr.flush()\n"
        "print('done', flush=True); os._exit(3)\n"
    )
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writing, start_new_session=True
    )
    os.close(writing)
    with LogWriter(path, JobSettings()) as writer:
        pump = LogPump(reading, writer)
        assert process.stdout.readline() == b"done\n" and process.wait(30) == 3
        assert not pump.wait(0.3), "the descendant should hold the pipe"
        began = time.monotonic()
        pump.stop()
        assert time.monotonic() - began < 30
        assert path.read_text().splitlines()[-1] == "the end"
    process.stdout.close()


def test_stop_ends_although_a_descendant_writes_all_the_time(path):
    reading, writing = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", "while True: print('y' * 200)"], stdout=writing, stderr=subprocess.DEVNULL
    )
    os.close(writing)
    try:
        with LogWriter(path, JobSettings()) as writer:
            pump = LogPump(reading, writer)
            time.sleep(0.3)
            pump.stop(drain_s=0.5)
            assert not pump._thread.is_alive()
    finally:
        process.kill()
        process.wait()


def test_a_bar_that_pauses_and_a_flood_that_ends_are_told_while_nothing_comes(path, monkeypatch):
    monkeypatch.setattr(lines_module, "BURST_BYTES", 5000)
    reading, writing = os.pipe()
    with LogWriter(path, JobSettings()) as writer, LogPump(reading, writer):
        os.write(writing, b"".join(b"flood %d\n" % n for n in range(500)))
        os.write(writing, b"\r1%\r")
        time.sleep(0.1)
        os.write(writing, b"2%\r3%\r")
        deadline = time.monotonic() + 30
        while not {"3%", "flood 499"} <= set(path.read_text().splitlines()) and time.monotonic() < deadline:
            time.sleep(0.05)
        lines = path.read_text().splitlines()
        os.close(writing)
    assert "3%" in lines and any("lines left out" in line for line in lines)
    assert "flood 499" in lines and "flood 0" in lines


def test_a_broken_log_does_not_stall_the_program(path, monkeypatch):
    reading, writing = os.pipe()
    with LogWriter(path, JobSettings()) as writer:
        monkeypatch.setattr(writer, "put", lambda lines: 1 / 0)
        pump = LogPump(reading, writer)
        for _ in range(50):
            os.write(writing, b"z" * 100_000 + b"\n")  # more than the pipe holds: blocks if nobody reads
        os.close(writing)
        assert pump.wait(30)


def test_pumps_leave_no_descriptors_and_no_threads_behind(path):
    with LogWriter(path, JobSettings()) as writer:
        before = len(os.listdir("/proc/self/fd")), threading.active_count()
        for n in range(20):
            reading, writing = os.pipe()
            with LogPump(reading, writer):
                os.write(writing, b"line\n")
                if n % 2:
                    os.close(writing)
            if not n % 2:
                os.close(writing)
        assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert path.read_text() == "line\n" * 20
