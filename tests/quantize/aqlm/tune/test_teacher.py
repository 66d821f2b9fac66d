"""Recorded predictions are those of the base model; where they cannot be recorded it runs each time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.formats.loader import load_model
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.teacher import LiveTeacher, RecordedTeacher, make_teachers
from tests.quantize.aqlm.tune.tiny import TRAIN, VALIDATION
from tests.quantize.models import make_model

TEXTS = {"train": TRAIN, "validation": VALIDATION[:, :20]}


def teachers(folder: Path, work: Path, memory_limit: int = 2**30, dtype: torch.dtype = torch.float32) -> Any:
    return make_teachers(
        folder, TEXTS, device=torch.device("cpu"), dtype=dtype, group=Group(), work=work, memory_limit=memory_limit
    )


@pytest.mark.parametrize("memory_limit", [2**30, 0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded(base: Path, tmp_path: Path, memory_limit: int, dtype: torch.dtype) -> None:
    found, reason = teachers(base, tmp_path, memory_limit, dtype)
    assert reason is None
    assert bool(list(tmp_path.rglob("*.bin"))) == (memory_limit == 0)
    model = load_model(base, dtype=dtype)
    for name, tokens in TEXTS.items():
        assert isinstance(found[name], RecordedTeacher)
        rows = [5, 0, 11]
        expected = model(tokens[rows]).logits
        torch.testing.assert_close(
            found[name].logits(rows), expected, rtol=0.02, atol=1e-5 if dtype.itemsize == 4 else 0.1
        )


def test_a_model_that_changes_its_heads_outputs_runs_each_time(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base", "gemma2", final_logit_softcapping=2.0)
    found, reason = teachers(folder, tmp_path)
    assert reason == "it changes the head's outputs"
    model = load_model(folder, dtype=torch.float32)
    for name, tokens in TEXTS.items():
        assert isinstance(found[name], LiveTeacher)
        logits = found[name].logits([3, 1])
        torch.testing.assert_close(logits, model(tokens[[3, 1]]).logits)
        assert float(logits.abs().max()) < 2.0


def test_a_full_disk_is_spared(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=200_000))
    found, reason = teachers(base, tmp_path, memory_limit=100_000)
    assert reason is not None and "of the disk are free" in reason
    assert isinstance(found["train"], LiveTeacher)
    assert not list(tmp_path.rglob("*.bin"))
    assert teachers(base, tmp_path)[1] is None  # in memory it needs none of it
