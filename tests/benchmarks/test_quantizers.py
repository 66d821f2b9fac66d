"""Rows, ratios and tables; and one whole run of the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.paths import PROJECT
from benchmarks import report
from benchmarks.entries import NATIVE, PEERS, Entry, entries
from benchmarks.inputs import demo_held_out, demo_tokens
from benchmarks.quantizers import COLUMNS, add_ratios, cells, interpreters, notes


def row(entry: Entry, **values: Any) -> dict[str, Any]:
    known = {"cpu_s": 30.0, "start_s": 5.0, "peak_bytes": 5e8, "bytes": 4e6}
    return {**vars(entry), **known, "kl": 0.001, "kl_stderr": 0.0001, "flips": 0.02, **values}


def test_every_peer_has_a_program() -> None:
    assert all((PROJECT / "benchmarks" / "peers" / program).is_file() for program in PEERS.values())
    named = {entry.quantizer for group in entries(low_bits=True, iterations=1) for entry in group}
    assert named == {NATIVE, *PEERS}


def test_only_native_entries_share_a_process() -> None:
    groups = list(entries(low_bits=True, iterations=0))
    assert all(entry.quantizer == NATIVE for group in groups if len(group) > 1 for entry in group)
    names = [entry.name for group in groups for entry in group]
    assert len(names) == len(set(names))
    assert {entry.bits for group in groups for entry in group} == {2, 3, 4}


@pytest.mark.parametrize(("name", "found"), [("autoawq", True), ("AutoAWQ/awq", True), ("awq", False)])
def test_entries_are_chosen_by_name(name: str, found: bool) -> None:
    assert Entry("autoawq", "AWQ").matches([name]) is found


def test_ratios_are_to_the_native_row_of_the_same_setting() -> None:
    rows = [
        row(Entry(NATIVE, "GPTQ"), cpu_s=10.0, start_s=4.0),
        row(Entry("gptqmodel", "GPTQ"), cpu_s=40.0, start_s=10.0),
        row(Entry("llm-compressor", "GPTQ", symmetric=True)),
    ]
    add_ratios(rows)
    assert [rows[0]["ratio"], rows[1]["ratio"], rows[1]["work_ratio"]] == [1.0, 4.0, 5.0]
    assert "ratio" not in rows[2]


def test_a_shared_process_is_no_base_for_ratios() -> None:
    rows = [row(Entry(NATIVE, "AWQ", 3), shared=8), row(Entry("llm-compressor", "AWQ", 3))]
    add_ratios(rows)
    assert "ratio" not in rows[1]
    assert cells(rows[0])[5] == "30.0 /8"


def test_failed_rows_have_as_many_cells_and_are_explained() -> None:
    failed = {**vars(Entry("autoawq", "AWQ")), "error": "not installed"}
    assert len(cells(failed)) == len(cells(row(Entry(NATIVE, "RTN")))) == len(COLUMNS)
    assert "autoawq AWQ: not installed" in notes([failed], full=False)


def test_tables_are_aligned() -> None:
    lines = report.table(["name", "n"], [["a", "10000"], ["long name", "1"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --------- | ----: |"
    assert lines[3] == "| long name |     1 |"


def test_interpreters_can_be_named() -> None:
    found = interpreters([f"gptqmodel={sys.executable}"])
    assert found["gptqmodel"] == Path(sys.executable).absolute()
    with pytest.raises(SystemExit, match="NAME=PATH"):
        interpreters(["gptqmodel=/no/such/file"])


def test_demo_tokens_are_whole_and_held_out_windows_start_with_bos() -> None:
    assert demo_tokens(2, 64).shape == (2, 64)
    held_out = demo_held_out(5)
    assert held_out.shape == (5, 513)
    assert held_out[:, 0].tolist() == [0] * 5
    assert len({tuple(window) for window in held_out.tolist()}) == 5


def test_the_command_measures_a_native_run(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    command = [sys.executable, "-m", "benchmarks.quantizers", "--only", "native/RTN", "--tokens", "512"]
    command += ["--held-out", "2", "--json", str(out), "--keep", str(tmp_path / "work")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    four = next(found for found in rows if found["bits"] == 4)
    two = next(found for found in rows if found["bits"] == 2)
    assert 0 < four["kl"] < two["kl"]
    assert four["start_s"] > 0 and four["cpu_s"] > 0  # how they compare is up to the machine
    assert two["bytes"] < four["bytes"] < 8e6
    assert "| native" in done.stdout
