"""AQLM's search beside the published procedure and GPTQ, Linear by Linear: CPU seconds and error on held-out inputs.

    python -m benchmarks.aqlm [--full] [--json FILE]

One process on one thread. Every row fits the same weight on the same Gram matrix, and is judged by the relative output
error, tr(E H E^T) / tr(W H W^T), on inputs that the fit did not see. Seconds are CPU seconds per million weights.
`reference` is our own writing of the published procedure, with the best of its rounds kept. `--full` adds the Linears
of a 1.1B-shaped decoder layer for the reference, too, which takes long; they are always there for the others.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import fit
from backend.quantize.gptq import factorize
from backend.quantize.gram import error_energy
from backend.quantize.grid import Grid
from backend.quantize.recipe import Recipe, Scheme
from backend.quantize.rounding import round_with_feedback
from benchmarks import report
from benchmarks.aqlm_layers import MILD, STRONG, Layer, demo, llama_shaped, synthetic

SCHEME = AdditiveScheme(2, 8, 8)
GPTQ_GROUPS = (64, 128)
EFFORTS = ("fast", "default", "thorough", "reference")
GOALS = {"fast": (30.0, 1.0), "default": (15.0, 0.8)}
"""Effort -> how much faster than `reference` at least, and at most which part of its error."""
SIZE_GOAL = 1.5  # seconds per weight of 2048-wide Linears, in those of 512-wide ones, at most
COLUMNS = ("Linear", "method", "bits", "s/Mweight", "x faster", "error, fitted", "error, held out", "of reference's")

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the reference on the 1.1B-shaped Linears, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    facts = report.machine()
    print(report.header(facts), flush=True)
    rows: list[Row] = []
    for layer in small_layers():
        rows += measured(layer, EFFORTS)
    for layer in llama_shaped(2048, 5632, 256, MILD):
        rows += measured(layer, EFFORTS if arguments.full else ("fast", "default"))
    print(report.table(COLUMNS, map(cells, rows)))
    print("\n" + "\n".join(verdicts(rows)))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak resident memory of the process, all Linears: {report.megabytes(peak)} MB")
    report.write(arguments.json, facts, rows)


def small_layers() -> Iterator[Layer]:
    """Linears on which the reference takes seconds, not minutes."""
    yield synthetic(512, 512, STRONG)
    yield synthetic(512, 512, MILD)
    yield from demo()


@torch.no_grad()
def measured(layer: Layer, efforts: tuple[str, ...]) -> list[Row]:
    """One row per method; each knows the reference's, if that is among them."""
    millions = layer.W.numel() / 1e6
    methods: dict[str, tuple[float, Callable[[], Tensor]]] = {
        f"GPTQ 2 bit g{size}": (2 + 18 / size, lambda size=size: gptq(layer, size)) for size in GPTQ_GROUPS
    }
    bits = SCHEME.stored_bits(*layer.W.shape) / layer.W.numel()
    for effort in efforts:
        settings = PRESETS[effort]
        methods[f"AQLM {effort}"] = (
            bits,
            lambda settings=settings: fit(layer.W, layer.H, SCHEME, settings, seed=0).weight.dequantize(),
        )
    rows = []
    for name, (stored, method) in methods.items():
        began = time.process_time()
        found = method()
        seconds = (time.process_time() - began) / millions
        errors = {key: relative(layer.W, found, H) for key, H in (("error", layer.H), ("held_out", layer.held_out))}
        rows.append({"layer": layer.name, "method": name, "bits": stored, "seconds": seconds, **errors})
        print(f"  {layer.name}, {name}: {seconds:.2f} s/Mweight, {errors['held_out']:.5f}", flush=True)
    reference = next((row for row in rows if row["method"] == "AQLM reference"), None)
    for row in rows:
        if reference is not None and row["method"].startswith("AQLM"):
            row |= {
                "faster": reference["seconds"] / row["seconds"],
                "part": row["held_out"] / reference["held_out"],
            }
    return rows


def gptq(layer: Layer, group_size: int) -> Tensor:
    """GPTQ at 2 bits as the core does it by itself, dequantised."""
    recipe = Recipe("gptq", Scheme("GPTQ", 2, group_size))
    factor = factorize(layer.H, recipe.damp, recipe.act_order)
    assert factor is not None
    grid = Grid.of(recipe.scheme, torch.float16)
    return round_with_feedback([layer.W], factor, grid, clip=recipe.clip, columns=None)[0].dequantize()


def relative(W: Tensor, found: Tensor, H: Tensor) -> float:  # noqa: N803
    """Energy of the output error in units of the output's."""
    return float(error_energy(found - W, H).double().sum() / error_energy(W, H).double().sum())


def verdicts(rows: list[Row]) -> Iterator[str]:
    """The goals, and whether they are met."""
    for effort, (faster, part) in GOALS.items():
        mine = [row for row in rows if row["method"] == f"AQLM {effort}" and "faster" in row]
        slowest, worst = min(mine, key=lambda row: row["faster"]), max(mine, key=lambda row: row["part"])
        yield (
            f"{effort}, at least {faster:g} times faster than the reference: {_met(slowest['faster'] >= faster)}, "
            f"{slowest['faster']:.1f} at the least ({slowest['layer']}), "
            f"{max(row['faster'] for row in mine):.1f} at the most"
        )
        yield (
            f"{effort}, at most {part:g} of the reference's error: {_met(worst['part'] <= part)}, "
            f"{worst['part']:.2f} at the most ({worst['layer']}), {min(row['part'] for row in mine):.2f} at the least"
        )
    wide = [row for row in rows if row["method"] == "AQLM default" and "2048" in row["layer"]]
    small = [row for row in rows if row["method"] == "AQLM default" and "512x512" in row["layer"]]
    ratio = mean_seconds(wide) / mean_seconds(small)
    yield f"1.1B-shaped, at most {SIZE_GOAL:g} times the cost per weight: {_met(ratio <= SIZE_GOAL)}, {ratio:.1f}"


def mean_seconds(rows: list[Row]) -> float:
    """Mean seconds per million weights."""
    return sum(row["seconds"] for row in rows) / len(rows)


def _met(yes: bool) -> str:
    return "met" if yes else "missed"


def cells(row: Row) -> list[str]:
    """A row of the table as text."""
    faster = f"{row['faster']:.1f}" if "faster" in row else ""
    part = f"{row['part']:.2f}" if "part" in row else ""
    numbers = [f"{row['bits']:.2f}", f"{row['seconds']:.2f}", faster]
    return [row["layer"], row["method"], *numbers, f"{row['error']:.5f}", f"{row['held_out']:.5f}", part]


if __name__ == "__main__":
    main()
