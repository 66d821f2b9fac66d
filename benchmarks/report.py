"""What every benchmark prints first, and tables. Imports no torch."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from backend.paths import PROJECT

PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors")
VECTOR_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")


def machine() -> dict[str, Any]:
    """Date, hardware, commit, versions and load of this moment."""
    now = datetime.datetime.now(datetime.UTC)
    return {
        "date": f"{now:%Y-%m-%d %H:%M} UTC",
        "commit": commit(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": [round(value, 2) for value in os.getloadavg()],
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def header(facts: dict[str, Any]) -> str:
    """The facts of `machine` in three lines."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    load = " ".join(f"{value:.2f}" for value in facts["load"])
    return (
        f"{facts['date']}, commit {facts['commit']}\n"
        f"{facts['cores']} cores of {facts['cpu']}; load average {load}\n"
        f"Python {facts['python']}, {versions}"
    )


def commit() -> str:
    """Short hash of the checkout, `+` if files differ from it."""
    try:
        revision, changes = (
            subprocess.run(["git", *words], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{revision}+" if changes else revision


def processor() -> str:
    """The processor's name and the vector instructions that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", facts.get("Features", "")).split()
    name = facts.get("model name", platform.machine())
    return " ".join([name, *(flag for flag in VECTOR_FLAGS if flag in flags)])


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns; all but the first are set to the right."""
    cells = [list(columns), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    lines = [
        [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        for row in cells
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def megabytes(number: float) -> str:
    """Bytes as whole MB (10^6)."""
    return f"{number / 1e6:.0f}"


def decimal(number: float | None, places: int) -> str:
    """A number, or nothing where there is none: a standard error of a single window, say."""
    return "" if number is None else f"{number:.{places}f}"


def write(path: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The same as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1), encoding="utf-8")
