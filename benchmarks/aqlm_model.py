"""AQLM at 2 bits on the demo model, with and without block finetuning, beside GPTQ at 2 bits with groups of 64.

    python -m benchmarks.aqlm_model [--samples N] [--length N] [--epochs N] [--lr X] [--efforts NAME ...] [--json FILE]

Every row is a process of its own, the same tokens, one thread per process (AQLM's search has one process per core).
CPU seconds are those of all its processes, from the start of the interpreter. KL is that of the files on disk to the
base model on held-out text, as in `benchmarks.quantizers`; AQLM's is to be at most 0.6 of GPTQ's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from backend.formats.bits import true_bits
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.recipe import Scheme
from benchmarks import native, report
from benchmarks.processes import Usage, call

BASELINE = Scheme("GPTQ", 2, 64)
GOAL = 0.6
COLUMNS = (
    "method", "CPU s", "of it start", "codes, wall s", "finetuning, wall s", "wall s", "peak MB", "bits", "KL, nats",
    "± s.e.", "flips %", "of GPTQ's KL",
)  # fmt: skip

Row = dict[str, Any]


def main() -> None:
    arguments = parse()
    finetune = FinetuneSettings(max_epochs=arguments.epochs, lr=arguments.lr, batch_size=arguments.batch)
    facts = report.machine()
    print(report.header(facts), flush=True)
    with ExitStack() as stack:
        work = arguments.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="quantdeck-bench-")))
        work.mkdir(parents=True, exist_ok=True)
        asked = {"samples": arguments.samples, "length": arguments.length, "held_out": arguments.held_out}
        request = {"out_dir": str(work / "inputs"), "shape": None, **asked}
        inputs, _ = call("benchmarks.inputs", request, work / "inputs_run", one_thread=False)
        start_s = native.start_cost(work).cpu_s
        tell("GPTQ")
        folders, usage = native.quantize(inputs, [BASELINE], work / "gptq")
        rows = [cost(BASELINE.label, usage, start_s, folders[BASELINE.label])]
        for effort in arguments.efforts:
            for settings in (None, finetune):
                name = f"AQLM {effort}" + (", finetuned" if settings else "")
                tell(name)
                folder = work / name.replace(", ", "-").replace(" ", "-")
                result, out, usage = native.calibrate_aqlm(
                    inputs, effort, settings, folder, val_size=arguments.val_size
                )
                parts = result["timings"]["quantize"]
                seconds = {"fit_s": parts["fit_s"], "finetune_s": parts["finetune_s"]}
                rows.append({**cost(name, usage, start_s, out), **seconds, "layers": result["layers"]})
        add_fidelity(rows, inputs, work)
    held_out = f"{arguments.val_size} of them held out by AQLM"
    print(f"the demo model, 6.3M parameters; calibration {arguments.samples} x {arguments.length} tokens, {held_out}")
    print(f"block finetuning: {finetune.max_epochs} epochs, lr {finetune.lr:g}, batch {finetune.batch_size}\n")
    print(report.table(COLUMNS, map(cells, rows)))
    report.write(arguments.json, facts, rows)
    if any(row["ratio"] > GOAL for row in rows[1:]):
        sys.exit(f"KL above {GOAL} of GPTQ's")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="calibration sequences")
    parser.add_argument("--length", type=int, default=512, help="tokens of each")
    parser.add_argument("--val-size", type=int, default=8, help="of them held out by AQLM")
    parser.add_argument("--held-out", type=int, default=32, help="windows of 512 tokens on which KL is measured")
    parser.add_argument("--efforts", nargs="+", choices=PRESETS, default=["fast", "default"])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="keep checkpoints and logs there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    return parser.parse_args()


def tell(name: str) -> None:
    print(f"  {name} ...", file=sys.stderr, flush=True)


def cost(name: str, usage: Usage, start_s: float, checkpoint: Path) -> Row:
    """The part of a row that the process itself gives."""
    seconds = {"cpu_s": usage.cpu_s, "start_s": start_s, "wall_s": usage.wall_s}
    size = {"peak_bytes": usage.peak_bytes, "bits": true_bits(checkpoint)}
    return {"name": name, **seconds, **size, "checkpoint": str(checkpoint)}


def add_fidelity(rows: list[Row], inputs: dict[str, Any], work: Path) -> None:
    """Compare every checkpoint with the base model, and with the first row."""
    tell("fidelity")
    request = {
        "base": inputs["model_dir"],
        "held_out_file": inputs["held_out_file"],
        "checkpoints": [row["checkpoint"] for row in rows],
    }
    result, _ = call("benchmarks.fidelity", request, work / "fidelity", one_thread=False)
    for row, found in zip(rows, result["results"], strict=True):
        row |= found
        row["ratio"] = row["kl"] / rows[0]["kl"]


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    parts = [f"{row[part]:.1f}" if part in row else "" for part in ("fit_s", "finetune_s")]
    seconds = [f"{row['cpu_s']:.1f}", f"{row['start_s']:.1f}", *parts, f"{row['wall_s']:.1f}"]
    quality = [
        f"{row['bits']:.2f}",
        f"{row['kl']:.5f}",
        report.decimal(row["kl_stderr"], 5),
        f"{100 * row['flips']:.2f}",
    ]
    return [row["name"], *seconds, report.megabytes(row["peak_bytes"]), *quality, f"{row['ratio']:.2f}"]


if __name__ == "__main__":
    main()
