"""What K results from one calibration cost, against one: at most 1 + 0.2 K times as much is the goal.

    python -m benchmarks.configurations [--layers 2] [--tokens 32768] [--methods AWQ GPTQ] [--json FILE]

A random Llama of the width of the 102.6M-parameter one. For each method one run with one configuration (4 bits, groups
of 128), then runs with two (4 and 3 bits) and four (4 and 3 bits, groups of 128 and 64), each in a fresh process on
one thread. CPU seconds are of the whole process, its start included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from backend.quantize.recipe import METHODS, Scheme
from benchmarks import native, report
from benchmarks.processes import call
from benchmarks.shapes import MEDIUM

LENGTH = 512
SETTINGS = ((4, 128), (3, 128), (4, 64), (3, 64))  # bits, group size
COUNTS = (1, 2, 4)
COLUMNS = ("method", "configurations", "CPU s", "of one", "goal", "peak MB", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["AWQ", "GPTQ"])
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    facts = report.machine()
    print(report.header(facts), flush=True)
    shape = {**MEDIUM, "num_hidden_layers": arguments.layers}
    samples = max(1, arguments.tokens // LENGTH)
    with tempfile.TemporaryDirectory(prefix="quantdeck-bench-") as folder:
        request = {"samples": samples, "length": LENGTH, "held_out": 0, "shape": shape}
        request["out_dir"] = str(Path(folder) / "inputs")
        inputs, _ = call("benchmarks.inputs", request, Path(folder) / "inputs_run", one_thread=False)
        rows = [row for method in arguments.methods for row in measure(method, inputs, Path(folder))]
    print(
        f"{arguments.layers} layers, {shape['hidden_size']} wide; calibration {samples} x {LENGTH} tokens; one thread\n"
    )
    print(report.table(COLUMNS, map(cells, rows)))
    report.write(arguments.json, facts, rows)


def measure(method: str, inputs: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """One row per number of configurations."""
    rows: list[dict[str, Any]] = []
    for count in COUNTS:
        print(f"  {method}, {count} configurations ...", file=sys.stderr, flush=True)
        schemes = [Scheme(method, bits, group_size) for bits, group_size in SETTINGS[:count]]
        _, usage = native.quantize(inputs, schemes, folder / f"{method}-{count}")
        one = rows[0]["cpu_s"] if rows else usage.cpu_s
        rows.append(
            {
                "method": method,
                "count": count,
                "cpu_s": usage.cpu_s,
                "wall_s": usage.wall_s,
                "peak_bytes": usage.peak_bytes,
                "ratio": usage.cpu_s / one,
                "goal": 1 + 0.2 * count,
            }
        )
    return rows


def cells(row: dict[str, Any]) -> list[str]:
    """A row of the table as text."""
    return [
        row["method"],
        str(row["count"]),
        f"{row['cpu_s']:.1f}",
        f"{row['ratio']:.2f}",
        f"at most {row['goal']:.1f}" if row["count"] > 1 else "",
        report.megabytes(row["peak_bytes"]),
        ("met" if row["ratio"] <= row["goal"] else "MISSED") if row["count"] > 1 else "",
    ]


if __name__ == "__main__":
    main()
