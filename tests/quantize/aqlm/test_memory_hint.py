"""Running out of memory is told with the numbers to change."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backend.errors import EngineError
from backend.jobs.outcomes import outcome_of_text
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.memory_hint import MemoryHint
from tests.quantize.models import make_model

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
SETTINGS = FinetuneSettings(batch_size=8, local_batch_size=8)


def hint(**changes: object) -> MemoryHint:
    values = {"device": CPU, "sequences": 8, "length": 512, "finetune": SETTINGS, "doing": "finetuning layer 3"}
    return MemoryHint(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"), "gpu_out_of_memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
    ],
)
def test_a_job_knows_the_outcome(error: Exception, outcome: str) -> None:
    with (
        pytest.raises(EngineError, match=r"while finetuning layer 3, with 8 x 512 tokens at a time") as caught,
        hint().explained(),
    ):
        raise error
    assert outcome_of_text(caught.value.message) == outcome
    assert caught.value.__cause__ is error


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shapes"), hint().explained():
        raise RuntimeError("shapes do not match")


def test_the_advice_fits_what_was_running() -> None:
    assert "local_batch_size 4 instead of 8" in hint().advice()
    assert "use_checkpointing" not in hint().advice()
    assert "use_checkpointing: true" in hint(finetuning=True).advice()
    checkpointed = replace(SETTINGS, use_checkpointing=True)
    assert "use_checkpointing" not in hint(finetuning=True, finetune=checkpointed).advice()
    assert hint(sequences=1).advice() == "shorter sequences than 512 tokens"


def test_a_process_with_too_little_memory(tmp_path: Path) -> None:
    """A limit on its address space stops the forward passes of a layer, not the interpreter."""
    make_model(tmp_path / "source", num_hidden_layers=1, intermediate_size=1024, max_position_embeddings=2048)
    program = """
import resource, sys, torch
from pathlib import Path
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from tests.quantize.aqlm.tiny import run
from tests.quantize.models import tokens
torch.set_num_threads(1)
settings = FinetuneSettings(max_epochs=1, batch_size=32, local_batch_size=32)
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**28, resource.RLIM_INFINITY))
try:
    run(Path(sys.argv[1]) / "source", Path(sys.argv[1]) / "out", settings, tokens(34, 2048), val_size=2)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.startswith("EngineError Memory of cpu ran out while calibrating model.layers.0, with 32 x 2048")
    assert "local_batch_size 16 instead of 32" in done.stdout
