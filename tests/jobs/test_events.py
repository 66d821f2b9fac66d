"""Event and log files are read by cursor, whole lines only."""

from backend.jobs.events import read_events, read_lines


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
