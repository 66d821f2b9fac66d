"""Quantdeck's core beside other quantizers: CPU seconds, memory and fidelity, in one run.

    python -m benchmarks.quantizers [--full] [--only NAME ...] [--json FILE]

Every quantizer gets the same model and the same calibration tokens and runs on one thread in a process of its own;
CPU seconds are those of the whole process, from the start of the interpreter, and are what a busy machine disturbs
least. The checkpoints are then read from disk by one reader and compared with the base model on held-out tokens.

By default the built-in demo model with 32 x 512 tokens: minutes. `--full`: a random Llama of 102.6 million parameters
with 128 x 512 tokens: hours with all peers, and KL and flips then mean nothing. A peer that is not installed is
reported as such; `--python gptqmodel=/path/to/python` names an environment that was made by hand.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backend.engines.environments import environment_python
from backend.errors import ConfigError
from backend.paths import PROJECT
from benchmarks import native, report
from benchmarks.entries import ELSEWHERE, NATIVE, PEERS, Entry, entries
from benchmarks.processes import ProgramError, Usage, call
from benchmarks.shapes import MEDIUM

LENGTH = 512
COLUMNS = (
    "quantizer", "method", "bits", "group", "sym", "CPU s", "of it start", "x native", "x without start",
    "peak MB", "KL, nats", "± s.e.", "flips %", "size MB",
)  # fmt: skip

Row = dict[str, Any]
"""The entry's fields; `error`, or `cpu_s`, `start_s`, `peak_bytes`, `bytes`, `kl`, `kl_stderr`, `flips`; `shared`: the
number of configurations that the process made, if more than one; `ratio` and `work_ratio` to the native row."""


def main() -> None:
    arguments = parse()
    facts = report.machine()
    print(report.header(facts), flush=True)
    with ExitStack() as stack:
        work = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantdeck-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        samples = max(1, (arguments.tokens or (65536 if arguments.full else 16384)) // LENGTH)
        request = {
            "out_dir": str(work / "inputs"),
            "samples": samples,
            "length": LENGTH,
            "held_out": arguments.held_out or (8 if arguments.full else 32),
            "shape": MEDIUM if arguments.full else None,
        }
        inputs, _ = call("benchmarks.inputs", request, work / "inputs_run", one_thread=False)
        about = "a random Llama of 102.6M parameters" if arguments.full else "the demo model, 6.3M parameters"
        print(f"{about}; calibration {samples} x {LENGTH} tokens; one thread\n", flush=True)
        rows = run_all(arguments, inputs, work)
        if not rows:
            sys.exit(f"--only: {' '.join(arguments.only)} names nothing; there are {NATIVE}, {', '.join(PEERS)}")
        add_fidelity(rows, inputs, work)
    add_ratios(rows)
    print(report.table(COLUMNS, map(cells, rows)))
    print("\n" + notes(rows, arguments.full))
    report.write(arguments.json, facts, rows)
    if any("error" in row for row in rows if row["quantizer"] == NATIVE):
        sys.exit(1)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the 102.6M-parameter random Llama, 128 x 512 tokens")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="quantizers, or quantizer/method, e.g. autoawq")
    parser.add_argument("--tokens", type=int, help="calibration tokens, for all; fewer make slow peers bearable")
    parser.add_argument("--held-out", type=int, help="windows of 512 tokens on which KL is measured")
    parser.add_argument("--auto-round", type=int, default=0, metavar="STEPS", help="run AutoRound with so many steps")
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH", help="interpreters of peers")
    parser.add_argument("--limit", type=float, default=7200.0, metavar="S", help="wall seconds per quantizer")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep checkpoints and logs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser.parse_args()


def run_all(arguments: argparse.Namespace, inputs: dict[str, Any], work: Path) -> list[Row]:
    """Run every quantizer; one row per entry, with `checkpoint` where there is one."""
    pythons = interpreters(arguments.python)
    start_s = native.start_cost(work).cpu_s
    rows: list[Row] = []
    for group in entries(low_bits=not arguments.full, iterations=arguments.auto_round):
        wanted = [entry for entry in group if arguments.only is None or entry.matches(arguments.only)]
        if not wanted:
            continue
        name = wanted[0].name if len(wanted) == 1 else f"{NATIVE}-{len(wanted)}-in-one"
        print(f"  {name} ...", file=sys.stderr, flush=True)
        folder = work / name
        try:
            if wanted[0].quantizer == NATIVE:
                found = run_native(wanted, inputs, folder, arguments.limit, start_s)
            else:
                found = [run_peer(entry, inputs, folder, arguments.limit, pythons) for entry in wanted]
        except ProgramError as error:
            found = [{"error": str(error)} for _ in wanted]
        rows += [{**asdict(entry), **row} for entry, row in zip(wanted, found, strict=True)]
    return rows


def run_native(wanted: list[Entry], inputs: dict[str, Any], folder: Path, limit_s: float, start_s: float) -> list[Row]:
    """One process for all these entries."""
    folders, usage = native.quantize(inputs, [entry.scheme for entry in wanted], folder, limit_s=limit_s)
    shared = {"shared": len(wanted)} if len(wanted) > 1 else {}
    return [{**measured(usage, start_s, folders[entry.scheme.label]), **shared} for entry in wanted]


def run_peer(
    entry: Entry, inputs: dict[str, Any], folder: Path, limit_s: float, pythons: dict[str, Path | None]
) -> Row:
    """One process of another quantizer."""
    python = pythons[entry.quantizer]
    if python is None:
        return {"error": "not installed"}
    request = {**inputs, "out_dir": str(folder / "out"), "configurations": [{"name": entry.name, **asdict(entry)}]}
    program = PROJECT / "benchmarks" / "peers" / PEERS[entry.quantizer]
    result, usage = call(program, request, folder, python=python, limit_s=limit_s)
    row = measured(usage, usage.cpu_s - result["cpu_s_after_imports"], folder / "out" / entry.name)
    return {**row, "versions": result["versions"]}


def measured(usage: Usage, start_s: float, checkpoint: Path) -> Row:
    """The part of a row that the process itself gives."""
    return {
        "cpu_s": usage.cpu_s,
        "start_s": start_s,
        "wall_s": usage.wall_s,
        "peak_bytes": usage.peak_bytes,
        "bytes": sum(file.stat().st_size for file in checkpoint.glob("*.safetensors")),
        "checkpoint": str(checkpoint),
    }


def interpreters(named: list[str]) -> dict[str, Path | None]:
    """The interpreter of each peer; None where it is not installed."""
    found: dict[str, Path | None] = {"llm-compressor": Path(sys.executable), "auto-round": Path(sys.executable)}
    for name in PEERS:
        if name not in found:
            try:
                found[name] = environment_python(name)
            except ConfigError:  # the project has no definition of this environment
                found[name] = None
    for setting in named:
        name, _, path = setting.partition("=")
        if name not in PEERS or not Path(path).is_file():
            sys.exit(f"--python: found {setting!r}; write NAME=PATH with NAME among {', '.join(PEERS)}")
        found[name] = Path(path).absolute()
    return found


def add_fidelity(rows: list[Row], inputs: dict[str, Any], work: Path) -> None:
    """Read every checkpoint and compare it with the base model."""
    present = [row for row in rows if "checkpoint" in row]
    request = {
        "base": inputs["model_dir"],
        "held_out_file": inputs["held_out_file"],
        "checkpoints": [row["checkpoint"] for row in present],
    }
    print("  fidelity ...", file=sys.stderr, flush=True)
    result, _ = call("benchmarks.fidelity", request, work / "fidelity", one_thread=False)
    for row, found in zip(present, result["results"], strict=True):
        row |= found


def add_ratios(rows: list[Row]) -> None:
    """CPU seconds of every row over those of the native row of the same method and setting."""
    keys = ("method", "bits", "group_size", "symmetric")
    own = {
        tuple(row[key] for key in keys): row
        for row in rows
        if row["quantizer"] == NATIVE and "cpu_s" in row and "shared" not in row
    }
    for row in rows:
        base = own.get(tuple(row[key] for key in keys))
        if base is None or "cpu_s" not in row:
            continue
        row["ratio"] = row["cpu_s"] / base["cpu_s"]
        row["work_ratio"] = (row["cpu_s"] - row["start_s"]) / (base["cpu_s"] - base["start_s"])


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    setting = [row["quantizer"], row["method"], row["bits"], row["group_size"], "yes" if row["symmetric"] else "no"]
    if "cpu_s" not in row:
        return [*map(str, setting), "-", *[""] * (len(COLUMNS) - 6)]
    shared = f" /{row['shared']}" if "shared" in row else ""
    cost = [
        f"{row['cpu_s']:.1f}{shared}",
        f"{row['start_s']:.1f}",
        f"{row['ratio']:.1f}" if "ratio" in row else "",
        f"{row['work_ratio']:.1f}" if "work_ratio" in row else "",
        report.megabytes(row["peak_bytes"]),
    ]
    quality = [""] * 3
    if "kl" in row:
        quality = [f"{row['kl']:.6f}", report.decimal(row["kl_stderr"], 6), f"{100 * row['flips']:.2f}"]
    return [*map(str, setting), *cost, *quality, f"{row['bytes'] / 1e6:.1f}"]


def notes(rows: list[Row], full: bool) -> str:
    """What the table leaves out: failures, shared runs, versions, what cannot be compared."""
    lines = []
    if shared := next((row for row in rows if "shared" in row), None):
        lines.append(f"CPU s with /{shared['shared']}: one process made all {shared['shared']} of these results.")
    if full:
        lines.append("KL and flips of a random model mean nothing; they only show that the checkpoint is whole.")
    versions = {row["quantizer"]: row["versions"] for row in rows if "versions" in row}
    lines += [f"{name}: {', '.join(map(' '.join, found.items()))}" for name, found in versions.items()]
    lines += [f"{row['quantizer']} {row['method']}: {row['error']}" for row in rows if "error" in row]
    present = {row["quantizer"] for row in rows if "cpu_s" in row}
    if not {"gptqmodel", "auto-round"} <= present:
        lines.append(ELSEWHERE)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
