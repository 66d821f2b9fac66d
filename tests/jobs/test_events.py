"""Event and log files are read by cursor, whole lines only."""

import os
import subprocess
import sys

from backend.jobs.events import end_torn_line, read_events, read_lines
from backend.jobs.follow import progress_line


def test_only_whole_lines_are_read_and_the_cursor_goes_on(tmp_path):
    path = tmp_path / "log"
    assert read_lines(path) == ([], 0)
    path.write_bytes(b"one\ntwo\nthr")
    assert read_lines(path) == (["one", "two"], 8)
    with open(path, "ab") as file:
        file.write("ee\n\xe4\n".encode("latin-1"))
    assert read_lines(path, 8) == (["three", "\ufffd"], 16)
    assert read_lines(path, 16) == ([], 16)


def test_a_tail_starts_at_a_line(tmp_path):
    path = tmp_path / "log"
    path.write_text("first line\nsecond line\nthird\n")
    assert read_lines(path, -10) == (["third"], 29)
    assert read_lines(path, -1000)[0] == ["first line", "second line", "third"]


def test_an_endless_line_does_not_stop_the_reader(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"x" * 250)
    first, cursor = read_lines(path, 0, limit=100)
    assert first == ["x" * 100] and cursor == 100


def test_torn_lines_are_skipped(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_text('{"stage": "a"}\n{"stage": \n[1]\n{"stage": "b"}\n')
    assert [e["stage"] for e in read_events(path)[0]] == ["a", "b"]


def test_an_event_after_a_torn_line_is_not_lost(tmp_path):
    path = tmp_path / "events.jsonl"
    assert end_torn_line(path) == 0
    path.write_text('{"stage": "a"}\n{"stage": "b')
    cursor = end_torn_line(path)
    assert cursor == path.stat().st_size == end_torn_line(path)
    with open(path, "a") as file:
        file.write('{"stage": "c"}\n')
    assert [e["stage"] for e in read_events(path)[0]] == ["a", "c"]
    assert [e["stage"] for e in read_events(path, cursor)[0]] == ["c"]


def test_a_line_of_progress_names_configuration_layer_errors_and_what_was_recovered():
    event = {
        "stage": "quantize", "step": 2, "total": 6, "configuration": "gptq-w3-g64", "layer": "model.layers.1",
        "error": 0.0123, "rtn_error": 0.05, "notes": ["q_proj: damp raised to 0.1"],
    }  # fmt: skip
    assert progress_line(event) == (
        "    quantize  2/6  [gptq-w3-g64]  model.layers.1  error 1.230e-02 (round-to-nearest 5.000e-02)  "
        "q_proj: damp raised to 0.1"
    )
    unknown = {**event, "error": None, "rtn_error": None, "configuration": None, "notes": []}
    assert progress_line(unknown) == "    quantize  2/6  model.layers.1"
    assert progress_line({"stage": "error", "message": "x"}) == ""


def test_the_event_of_an_error_holds_no_secret(tmp_path):
    """A program's events go from its standard output right to the file: they must be clean when they leave it."""
    token = "hf_" + "QdTestTokenNotReal0123456789abcdef"  # made up
    code = (
        "import os\nfrom backend.event_stream import EventWriter\n"
        "events = EventWriter.claim_stdout()\n"
        "events.note(stage='prepare', message='with ' + os.environ['QD_TEST_PASSWORD'], notes=[os.environ['T']])\n"
        "events.error(ValueError('x'), f\"401 at https://u:{os.environ['T']}@x.example/\")\n"
    )
    path = tmp_path / "events.jsonl"
    with open(path, "wb") as out:
        variables = {**os.environ, "T": token, "QD_TEST_PASSWORD": "not, a real one"}
        subprocess.run([sys.executable, "-c", code], stdout=out, env=variables, check=True)
    note, error = read_events(path)[0]
    assert (note["message"], note["notes"]) == ("with [redacted]", ["[redacted]"])
    assert error["message"] == "401 at https://[redacted]@x.example/" and error["kind"] == "ValueError"
    assert token.encode() not in path.read_bytes()
