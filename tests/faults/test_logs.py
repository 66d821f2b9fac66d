"""Programs that do their worst to a log (fault 23): it stays small, readable, without secrets; nobody stalls."""

import json
import os
import subprocess
import sys
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from backend.jobs.logs.files import parts
from backend.jobs.logs.lines import CHUNK
from backend.jobs.logs.pump import LogPump
from backend.jobs.logs.tail import tail
from backend.jobs.logs.writer import LogWriter
from backend.jobs.redact import LONGEST_SECRET
from backend.paths import PROJECT

TOKEN = "hf_" + "QdTestTokenNotReal0123456789abcdef"  # made up, as everything here
PASSWORD = "Tr0ub4dor/&3 not-a-real=one"
PIECE = 10  # so many characters of a secret in a row are a leak

# The part of the runner: takes what a program writes to the log, and tells its own memory after each program.
PUMP = """
import json, os, subprocess, sys
from pathlib import Path
from types import SimpleNamespace
from backend.jobs.logs.pump import LogPump
from backend.jobs.logs.writer import LogWriter

def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) // 1024

limits = SimpleNamespace(log_bytes=1 << 20, log_files=4, line_bytes=16384)
told = []
with LogWriter(Path(sys.argv[1]), limits) as writer:
    for code in sys.argv[2:]:
        reading, writing = os.pipe()
        program = subprocess.Popen([sys.executable, "-c", code], stderr=writing)
        os.close(writing)
        with LogPump(reading, writer) as pump:
            status = program.wait(timeout=120)
            at_end, last = pump.wait(60), pump.last(1)
        told.append({"status": status, "at_end": at_end, "last": last, "rss": memory("VmRSS"), "peak": memory("VmHWM")})
print(json.dumps(told))
"""

WARM_UP = "import sys\nfor n in range(20000): sys.stderr.write(f'warm {n} {n * 7919 % 1000003}\\n')"
LINES = "import sys\nfor n in range(300_000): sys.stderr.write(f'{n} a line of an engine that talks too much\\n')"
LONG_LINE = "import os\nfor _ in range(800): os.write(2, b'x' * 65536)\nos.write(2, b'\\nafter the long line\\n')"
BARS = (
    "import sys\n"
    "for n in range(300_000): sys.stderr.write(f'\\r{n / 3000:5.1f}% |' + '#' * (n // 10000))\n"
    "sys.stderr.write('\\n')"
)
NO_TEXT = (
    "import os, random\nr = random.Random(7)\n"
    "for _ in range(200): os.write(2, r.randbytes(65536))\n"
    "os.write(2, b'\\n' + bytes(10_000_000) + b'\\n\\xff\\xfe\\x1b[31m\\x00 the very end\\n')"
)


@dataclass
class Small:
    log_bytes: int = 1 << 20
    log_files: int = 4
    line_bytes: int = 16384


def test_spam_long_lines_bars_and_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "log.log"
    programs = (WARM_UP, NO_TEXT, LINES, LONG_LINE, BARS)
    done = subprocess.run(
        [sys.executable, "-c", PUMP, str(path), *programs], cwd=PROJECT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    first, *others = json.loads(done.stdout)
    for told in (first, *others):
        assert told["status"] == 0 and told["at_end"], "a program was stalled, or its output was not taken to the end"
        assert told["peak"] < first["peak"] + 40, "the pump's memory grows with what programs write"
    files = parts(path)
    assert len(files) == 4 and all(file.stat().st_size <= 1 << 20 for file in files)
    text = "".join(file.read_bytes().decode("utf-8") for file in files)  # strictly: it is text
    assert not [c for c in map(chr, [*range(9), *range(11, 32), 127, *range(128, 160)]) if c in text]
    assert max(map(len, text.split("\n"))) <= 16384 + 50
    assert others[0]["last"] == ["\ufffd\ufffd the very end"]
    lines = tail(path)[0]
    assert "after the long line" in lines and any("bytes cut]" in line for line in lines)
    assert f"{299_999} a line of an engine that talks too much" in text
    assert lines[-1].startswith("100.0% |##") and text.count("% |") < 100, "a bar of 300,000 states leaves a few"


def leaks(folder: Path, secret: str) -> list[str]:
    """Pieces of a secret in any file of a folder."""
    pieces = {secret[i : i + PIECE] for i in range(len(secret) - PIECE + 1)}
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files
    return [f"{file}: {piece}" for file in files for piece in pieces if piece.encode() in file.read_bytes()]


SPILL = """
import json, os, sys, time, traceback
from base64 import b64encode
from urllib.parse import quote
token, password = os.environ["HF_TOKEN"], os.environ["QD_TEST_PASSWORD"]

def say(text, pause=0.0):
    os.write(2, text.encode())
    time.sleep(pause)

for secret in (token, password):
    say(f"using {secret} now\\n")
    say(f"GET https://user:{quote(secret, safe='')}@example.org/model?token={quote(secret, safe='')}&x=1\\n")
    try:
        raise PermissionError(f"401 for {secret!r}")
    except PermissionError:
        traceback.print_exc()
    for cut in range(1, len(secret)):
        say(f"cut at {cut}: " + secret[:cut], 0.002)
        say(secret[cut:] + "\\n")
    say("one character at a time: ")
    for c in secret:
        say(c, 0.001)
    say("\\n")
    say(f"\\r10% {secret}\\r20% {secret}\\r", 0.05)
    say(f"30% {secret[:8]}", 0.05)
    say(secret[8:] + "\\n")
    say(f"\\x1b[1m{secret[:9]}\\x1b[0m{secret[9:]} in colours\\n")
    say(json.dumps({"headers": {"Authorization": "Bearer " + secret}}) + "\\n")
    say(f"the end without a new line in a log record, {secret}", 0.05)
    say("\\n")
say(repr(dict(os.environ)) + "\\n")
say("\\n".join(f"{k}={v}" for k, v in os.environ.items()) + "\\n")
say(f"last {token}")
"""


def test_secrets_of_a_program_reach_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("QD_TEST_PASSWORD", PASSWORD)
    path = tmp_path / "log.log"
    reading, writing = os.pipe()
    with LogWriter(path, Small()) as writer:
        process = subprocess.Popen([sys.executable, "-c", SPILL], stderr=writing)
        os.close(writing)
        with LogPump(reading, writer) as pump:
            assert process.wait(60) == 0 and pump.wait(60)
            last = pump.last(1000)
    lines = tail(path)[0]
    assert lines[-1] == "last [redacted]" and sum("cut at" in line for line in lines) > 50
    assert any("in colours" in line for line in lines) and any("PermissionError" in line for line in lines)
    assert leaks(tmp_path, TOKEN) == []
    for form in (PASSWORD, quote(PASSWORD, safe=""), json.dumps(PASSWORD)[1:-1]):
        assert leaks(tmp_path, form) == []
    assert not any(TOKEN[i : i + PIECE] in line for line in (*lines, *last) for i in range(len(TOKEN) - PIECE))


# The part of the runner again, here with its own way to run a program; it prints why that failed.
RUN = """
import sys
from pathlib import Path
from backend.jobs.logs.writer import LogWriter
from backend.jobs.outcomes import StageError
from backend.jobs.program import Command, Watch, run_program
from backend.settings import JobSettings

folder = Path(sys.argv[1])
watch = Watch(
    on_event=print, on_poll=lambda: None, on_signal=print, on_stuck=print, grace_s=lambda error: (1.0, 1.0),
    writes=lambda: (folder, None),
)
with LogWriter(folder / "log.log", JobSettings()) as log:
    try:
        run_program(
            Command((sys.executable, "-c", sys.argv[2]), hub_token=True), device={},
            events_file=folder / "events.jsonl", log=log, watch=watch,
        )
    except StageError as error:
        print("failed:", error.message)
"""

TELLS = """
import os, sys
from backend.event_stream import EventWriter
token = os.environ["HF_TOKEN"]
events = EventWriter.claim_stdout()
print("not an event:", token, flush=True)
events.note(stage="prepare", step=1, total=1, message=f"from https://u:{token}@x.example", notes=[token])
"""


@pytest.mark.parametrize(
    "end", ["events.error(ValueError(token), f'401 for {token}'); sys.exit(1)", "raise RuntimeError(token)"]
)
def test_secrets_reach_neither_events_nor_reasons(tmp_path, monkeypatch, end):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path), TELLS + end],
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "from https://[redacted]@x.example" in done.stdout and "failed: " in done.stdout
    assert "[redacted]" in done.stdout.split("failed: ")[1]
    assert TOKEN not in done.stdout + done.stderr
    assert "not an event: [redacted]" in (tmp_path / "log.log").read_text()
    assert "[redacted]" in (tmp_path / "events.jsonl").read_text()
    assert leaks(tmp_path, TOKEN) == []


@pytest.mark.parametrize("filler", [b"a ", b"\x1b[0m", b"\x00", b"\xff", b"b=c\n"], ids=repr)
@pytest.mark.parametrize("border", [CHUNK, 16384, 16384 + LONGEST_SECRET])
def test_secrets_over_the_borders_of_chunks_and_of_the_line_cap(tmp_path, filler, border):
    """At every place around the border, followed by nothing, by more of the line, or by far more of it."""
    with LogWriter(tmp_path / "log.log", Small(log_bytes=64 << 20)) as writer:
        for before in range(0, len(TOKEN) + 2, 3):
            for after in (b"\n", b" more\n", b" " + b"m" * 40_000 + b"\n"):
                start = border - before
                data = (filler * (start // len(filler) + 1))[: start - 1] + b" " + TOKEN.encode() + after
                stream = writer.stream()
                stream.feed(data)
                stream.end()
    assert leaks(tmp_path, TOKEN) == []


def test_a_private_key_over_many_writes_reaches_no_file(tmp_path):
    body = [b64encode(bytes([65 + n % 26]) * 48).decode() for n in range(25)]
    key = "\n".join(["-----BEGIN RSA PRIVATE KEY-----", *body, "-----END RSA PRIVATE KEY-----", "after", ""])
    with LogWriter(tmp_path / "log.log", Small()) as writer:
        for n in (1, 7, 64, 100, 5000):
            stream = writer.stream()
            for start in range(0, len(key), n):
                stream.feed(key[start : start + n].encode())
        prefixed = "".join(f"[rank0]: {line}\n" for line in key.splitlines())
        writer.write(prefixed)
    assert tail(tmp_path / "log.log")[0].count("after") == 5
    for line in body:
        assert leaks(tmp_path, line) == []


def test_secrets_among_lines_that_were_left_out(tmp_path):
    """What is kept of a flood is as clean as the rest."""
    with LogWriter(tmp_path / "log.log", Small(log_bytes=64 << 20)) as writer:
        for n in range(100):
            writer.write(f"{n} {TOKEN}\n" * 2000)
        key = "\n".join(["A" * 3 + b64encode(bytes([n]) * 40).decode() for n in range(60)])
        writer.write("-----BEGIN PRIVATE KEY-----\n" + key + "\n")
    lines = tail(tmp_path / "log.log")[0]
    assert any("lines left out" in line for line in lines), "the flood was no flood"
    assert leaks(tmp_path, TOKEN) == []
    assert not any(leaks(tmp_path, line) for line in key.splitlines())


def test_a_disk_that_is_full_stalls_no_program_and_is_told_when_there_is_room(tmp_path):
    path = tmp_path / "log.log"
    path.symlink_to("/dev/full")  # every write meets ENOSPC
    reading, writing = os.pipe()
    with LogWriter(path, Small()) as writer:
        process = subprocess.Popen([sys.executable, "-c", LINES + "\nsys.stderr.write('end\\n')"], stderr=writing)
        os.close(writing)
        with LogPump(reading, writer) as pump:
            assert process.wait(120) == 0 and pump.wait(60)
            assert pump.last(1) == ["end"]
        room = tmp_path / "room"
        room.touch()
        os.replace(room, path)
        writer._looked_at = 0.0  # it looks once a second
        writer.line("there is room again")
    lines = path.read_text().splitlines()
    assert "could not be written, the disk was full" in lines[0] and lines[-1] == "there is room again"
