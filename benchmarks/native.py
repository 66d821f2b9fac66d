"""Runs Quantdeck's own core as a job would: the same program, in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import Recipe, Scheme
from benchmarks.processes import ONE_THREAD, Usage, call, run

PROGRAM, AQLM_PROGRAM = "backend.engines.native", "backend.engines.aqlm_calibrate"
START = (
    "from backend.quick_start import quick_import; quick_import('backend.formats.writer', 'backend.quantize.pipeline')"
)
"""What it imports before it computes, torch and transformers among it."""


def configuration(scheme: Scheme) -> dict[str, Any]:
    """One configuration of a request, with the layout that other programs load: AutoAWQ's where it can hold it."""
    layout = "autoawq-gemm" if scheme.bits == 4 and not scheme.symmetric else "compressed-tensors"
    recipe = Recipe(scheme.label, scheme).to_dict()
    return {"name": scheme.label, "label": scheme.label, "recipe": recipe, "layout": layout, "dtype": "float16"}


def quantize(
    inputs: Mapping[str, Any], schemes: Sequence[Scheme], folder: Path, *, limit_s: float = 3600.0
) -> tuple[dict[str, Path], Usage]:
    """Quantize once for all schemes, on one thread.

    Args:
        inputs: What `benchmarks.inputs` made.
        schemes: The configurations.
        folder: Takes the checkpoints and the log.
        limit_s: Wall seconds after which it is stopped.

    Returns:
        Label of each scheme -> its checkpoint, and what the process cost.

    Raises:
        ProgramError: If it failed.
    """
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(folder / "out"),
        "checkpoint_dir": None,
        "device": "cpu",
        "seed": 0,
        "configurations": [configuration(scheme) for scheme in schemes],
    }
    _, usage = call(PROGRAM, request, folder, limit_s=limit_s)
    return {scheme.label: folder / "out" / scheme.label for scheme in schemes}, usage


def calibrate_aqlm(
    inputs: Mapping[str, Any],
    effort: str,
    finetune: FinetuneSettings | None,
    folder: Path,
    *,
    val_size: int = 8,
    limit_s: float = 3600.0,
) -> tuple[dict[str, Any], Path, Usage]:
    """AQLM's calibration with 2x8 codebooks for groups of 8, on one thread per process.

    Args:
        inputs: What `benchmarks.inputs` made.
        effort: Preset of the search.
        finetune: Block finetuning, or None.
        folder: Takes the checkpoint and the log.
        val_size: Sequences held out.
        limit_s: Wall seconds after which it is stopped.

    Returns:
        The program's result, its checkpoint, and what the process cost, its workers included.

    Raises:
        ProgramError: If it failed.
    """
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(folder / "out"),
        "checkpoint_dir": str(folder / "progress"),
        "device": "cpu",
        "seed": 0,
        "configuration": {
            "name": "calibrated",
            "scheme": asdict(AdditiveScheme(2, 8, 8)),
            "layout": "aqlm",
            "dtype": "float16",
            "search": PRESETS[effort].to_dict(),
            "finetune": finetune and finetune.to_dict(),
            "val_size": val_size,
            "compute_dtype": None,
            "true_sequential": False,
        },
    }
    result, usage = call(AQLM_PROGRAM, request, folder, limit_s=limit_s)
    return result, folder / "out", usage


def start_cost(folder: Path) -> Usage:
    """What a process costs that imports all this and ends: the least of three, so that no work is left out with it."""
    command, log = [sys.executable, "-c", START], folder / "start.txt"
    return min((run(command, log=log, limit_s=600.0, environment=ONE_THREAD) for _ in range(3)), key=lambda u: u.cpu_s)
