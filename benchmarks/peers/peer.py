"""The frame of the peers' programs: `python run_NAME.py REQUEST.json RESULT.json`.

They run in other environments than Quantdeck's, so they use nothing of it. The request has `model_dir`,
`tokens_file` (safetensors with `tokens`), `out_dir`, and `configurations`, of which there is one: `method`, `bits`,
`group_size`, `symmetric`, and `iterations` for AutoRound. The checkpoint is written to out_dir/<name>.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Task:
    """What a peer is to do.

    Attributes:
        model_dir: The base model.
        tokens: Calibration, int64 (samples, length).
        out_dir: Where the checkpoint goes.
        method: `RTN`, `AWQ`, `GPTQ`, `AWQ+GPTQ` or `AutoRound`.
        bits: Bits per weight.
        group_size: Weights that share a scale.
        symmetric: Whether the middle code stands for 0.
        iterations: Optimisation steps per block (AutoRound).
    """

    def __init__(self, request: dict[str, Any]) -> None:
        (configuration,) = request["configurations"]
        self.model_dir: str = request["model_dir"]
        self.tokens = load_file(request["tokens_file"])["tokens"]
        self.out_dir = str(Path(request["out_dir"]) / configuration["name"])
        self.method: str = configuration["method"]
        self.bits: int = configuration["bits"]
        self.group_size: int = configuration["group_size"]
        self.symmetric: bool = configuration["symmetric"]
        self.iterations: int = configuration.get("iterations", 0)


def run(quantize: Callable[[Task], None], *packages: str) -> None:
    """Quantize with one thread; the result has the CPU seconds spent after all imports, and versions."""
    torch.set_num_threads(1)
    request, result = (Path(argument) for argument in sys.argv[1:3])
    task = Task(json.loads(request.read_text(encoding="utf-8")))
    began = _cpu_s()
    quantize(task)
    found = {"cpu_s_after_imports": _cpu_s() - began, "versions": {p: version(p) for p in packages}}
    result.write_text(json.dumps(found), encoding="utf-8")


def _cpu_s() -> float:
    """CPU seconds of this process and of the children that it waited for."""
    return sum(os.times()[:4])
