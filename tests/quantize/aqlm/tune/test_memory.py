"""Running out of memory ends with an error that names the numbers to change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from backend.errors import EngineError
from backend.jobs.outcomes import outcome_of_text
from backend.quantize.aqlm.tune.memory import advice, explained
from backend.quantize.aqlm.tune.settings import TuneSettings

ROOT = Path(__file__).parents[4]
PROGRAM = """
import re, resource, sys
from pathlib import Path
import torch
from backend.errors import EngineError
from tests.quantize.aqlm.tune.tiny import text, tuned
torch.set_num_threads(1)
train = text(16, 1, 4096)

def limit(stage):
    if stage == "tune":
        now = int(re.search(r"VmSize:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        resource.setrlimit(resource.RLIMIT_AS, (now + 100 * 2**20,) * 2)

try:
    sizes = {"batch_size": 16, "microbatch_size": 16}
    tuned(*map(Path, sys.argv[1:4]), train=train, validation=train[:1], on_stage=limit, **sizes)
except EngineError as error:
    print(error.message)
"""


def test_out_of_memory(base: Path, start: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(base), str(start), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "Memory of cpu ran out while tuning with 16 x 4096 tokens at a time in 1 process." in done.stdout
    assert "microbatch_size 8 instead of 16" in done.stdout
    assert "gradient_checkpointing: true" in done.stdout
    assert "model_seqlen 2048 instead of 4096" in done.stdout
    assert outcome_of_text(done.stdout) == "out_of_memory"  # what the job will say


def test_advice_leaves_out_what_is_done() -> None:
    settings = TuneSettings(
        batch_size=8, microbatch_size=1, gradient_checkpointing=True, code_adam_16bit=True,
        straight_through_buffer_dtype="bfloat16",
    )  # fmt: skip
    assert advice(settings, 2, 4096) == [
        "model_seqlen 2048 instead of 4096",
        "update_codes: false, which needs no buffer",
    ]
    assert advice(TuneSettings(batch_size=12, microbatch_size=6), 1, 64)[0].startswith("microbatch_size 3 instead of 6")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), explained(TuneSettings(), 1, 64, torch.device("cpu")):
        raise RuntimeError("wrong shape")
    with pytest.raises(EngineError, match="tried to allocate"), explained(TuneSettings(), 1, 64, torch.device("cpu")):
        raise MemoryError
