"""One whole run of the command, on little text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.paths import PROJECT


def test_rows_and_table(tmp_path: Path) -> None:
    sizes = ["--samples", "6", "--length", "64", "--val-size", "2", "--held-out", "2", "--epochs", "1", "--batch", "2"]
    command = [sys.executable, "-m", "benchmarks.aqlm_model", "--efforts", "fast", *sizes, "--json", tmp_path / "rows"]
    done = subprocess.run(list(map(str, command)), cwd=PROJECT, capture_output=True, text=True, check=False)
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [row["name"] for row in rows] == ["gptq-w2-g64", "AQLM fast", "AQLM fast, finetuned"]
    for row in rows:
        assert row["ratio"] == pytest.approx(row["kl"] / rows[0]["kl"])
        assert f"{row['kl']:.5f}" in done.stdout
        assert 2 < row["bits"] < 2.5
        assert row["cpu_s"] > 0 and row["peak_bytes"] > 10**8
    assert rows[1]["finetune_s"] == 0 < rows[2]["finetune_s"]
    assert done.returncode == int(any(row["ratio"] > 0.6 for row in rows[1:])), done.stderr
