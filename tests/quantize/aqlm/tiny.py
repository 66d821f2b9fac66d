"""AQLM on small random models: what several of its tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.finetune_settings import FinetuneSettings
from backend.quantize.aqlm.pipeline import calibrate
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.report import CalibrationReport
from backend.quantize.aqlm.scheme import AdditiveScheme
from tests.quantize.models import tokens

SCHEME = AdditiveScheme(2, 5, 8)
SEARCH = PRESETS["fast"]
FINETUNE = FinetuneSettings(max_epochs=3, lr=1e-3, batch_size=4, local_batch_size=2)
SAMPLES, HELD_OUT = 10, 3


def run(
    source: Path,
    out: Path,
    finetune: FinetuneSettings | None = FINETUNE,
    ids: Tensor | None = None,
    *,
    scheme: AdditiveScheme = SCHEME,
    **options: Any,
) -> CalibrationReport:
    """Calibrate in float32 into a finished folder."""
    writer = CheckpointWriter(out, source, layout="aqlm", dtype="float16")
    ids = tokens(SAMPLES) if ids is None else ids
    asked = {"val_size": HELD_OUT, "dtype": torch.float32, **options}
    report = calibrate(source, ids, scheme, SEARCH, finetune, writer, **asked)
    writer.finish(report.kept)
    return report
