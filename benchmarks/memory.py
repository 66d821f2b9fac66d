"""Peak memory of the native core: the same for any depth, and bounded for wide models.

    python -m benchmarks.memory [--wide] [--layers 8 32] [--json FILE]

By default random Llamas of one width with 8 and 32 layers; the largest peak over the smallest is to be at most 1.05.
`--methods AQLM`: its calibration with one epoch of block finetuning, in the preset `fast`.
`--wide`: two layers of an 8B model (hidden 4096, intermediate 14336, vocabulary 128256), whose peak is to be under
6 GiB; needs 6 GB on disk for a while. Peak memory is the kernel's count of the whole process (`ru_maxrss`): libraries,
weights mapped from files, everything.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.recipe import METHODS, Scheme
from benchmarks import native, report
from benchmarks.processes import call
from benchmarks.shapes import NARROW, WIDE

AQLM = "AQLM"
DEPTH_LIMIT = 1.05
WIDE_LIMIT = 6 * 2**30
LENGTH = 512
COLUMNS = ("model", "method", "checkpoint MB", "CPU s", "peak MB", "of the first", "goal", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wide", action="store_true", help="the width of an 8B model instead")
    parser.add_argument("--layers", type=int, nargs="+", help="depths; default 8 32, or 2 with --wide")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, AQLM], default=["AWQ", "GPTQ"])
    parser.add_argument("--tokens", type=int, default=4096, help="calibration tokens")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made for a while; default: the system's")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    shape, depths = (WIDE, [2]) if arguments.wide else (NARROW, [8, 32])
    facts = report.machine()
    print(report.header(facts), flush=True)
    rows: list[dict[str, Any]] = []
    for layers in arguments.layers or depths:
        with tempfile.TemporaryDirectory(prefix="quantdeck-bench-", dir=arguments.folder) as folder:
            samples = max(1, arguments.tokens // LENGTH)
            rows += measure({**shape, "num_hidden_layers": layers}, arguments.methods, samples, Path(folder))
    for row in rows:
        first = next(other for other in rows if other["method"] == row["method"])
        row["of_first"] = row["peak_bytes"] / first["peak_bytes"]
        row["met"] = row["peak_bytes"] < WIDE_LIMIT if arguments.wide else row["of_first"] <= DEPTH_LIMIT
    goal = f"{WIDE_LIMIT / 1e6:.0f} MB" if arguments.wide else f"{DEPTH_LIMIT:.2f}"
    print(f"calibration {arguments.tokens} tokens in sequences of {LENGTH}; one thread\n")
    print(report.table(COLUMNS, (cells(row, goal) for row in rows)))
    report.write(arguments.json, facts, rows)


def measure(shape: dict[str, int], methods: list[str], samples: int, folder: Path) -> list[dict[str, Any]]:
    """Quantize one random model with each method, each in a process of its own."""
    request = {"out_dir": str(folder / "inputs"), "samples": samples, "length": LENGTH, "held_out": 0, "shape": shape}
    inputs, _ = call("benchmarks.inputs", request, folder / "inputs_run", one_thread=False)
    size = sum(file.stat().st_size for file in Path(inputs["model_dir"]).glob("*.safetensors"))
    rows = []
    for method in methods:
        print(f"  {shape['num_hidden_layers']} layers, {method} ...", file=sys.stderr, flush=True)
        run = folder / method
        if method == AQLM:
            finetune = FinetuneSettings(max_epochs=1)
            usage = native.calibrate_aqlm(inputs, "fast", finetune, run, val_size=1)[2]
        else:
            usage = native.quantize(inputs, [Scheme(method)], run)[1]
        shutil.rmtree(run)
        cost = {"cpu_s": usage.cpu_s, "wall_s": usage.wall_s, "peak_bytes": usage.peak_bytes}
        rows.append({"shape": shape, "method": method, "bytes": size, **cost})
    return rows


def cells(row: dict[str, Any], goal: str) -> list[str]:
    """A row of the table as text."""
    shape = row["shape"]
    return [
        f"{shape['num_hidden_layers']} layers, {shape['hidden_size']} wide",
        row["method"],
        report.megabytes(row["bytes"]),
        f"{row['cpu_s']:.1f}",
        report.megabytes(row["peak_bytes"]),
        f"{row['of_first']:.3f}",
        f"at most {goal}",
        "met" if row["met"] else "MISSED",
    ]


if __name__ == "__main__":
    main()
