"""Small random models in folders, and recipes that fit them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.loader import load_model
from backend.formats.stored_linears import stored_linears
from backend.formats.weight import QuantizedWeight
from backend.formats.writer import CheckpointWriter
from backend.quantize.pipeline import quantize as run
from backend.quantize.recipe import Recipe, Scheme
from backend.quantize.report import QuantizationReport
from backend.quantize.weights import WeightFiles
from tests.quantize.models import CONFIGS, VOCABULARY, config, make_model, tokens

__all__ = [
    "AWQ", "CONFIGS", "RTN", "VOCABULARY", "config", "linears", "logits", "make_model", "quantize", "quantize_all",
    "recipe", "tokens",
]  # fmt: skip


def recipe(method: str = "AWQ", bits: int = 4, group_size: int = 32, symmetric: bool = False, **options: Any) -> Recipe:
    scheme = Scheme(method, bits, group_size, symmetric)
    return Recipe(**{"name": scheme.label, "scheme": scheme, **options})


AWQ = recipe()
RTN = recipe("RTN", clip=False)  # nothing is searched


def quantize_all(
    source: Path,
    out: Path,
    recipes: Sequence[Recipe],
    layout: str = "compressed-tensors",
    stored: str | None = "float16",
    **options: Any,
) -> QuantizationReport:
    """Each recipe into `out`/its name; `stored` is the type of what stays unquantized."""
    writers = [CheckpointWriter(out / r.name, source, layout=layout, dtype=stored) for r in recipes]
    ids = options.pop("tokens", tokens())
    report = run(source, ids, recipes, writers, **{"dtype": torch.float32, **options})
    for r, writer in zip(recipes, writers, strict=True):
        writer.finish(report.kept[r.name])
    return report


def quantize(
    source: Path,
    out: Path,
    recipe: Recipe = AWQ,
    layout: str = "autoawq-gemm",
    stored: str | None = "float16",
    **options: Any,
) -> QuantizationReport:
    """One recipe into `out` itself."""
    writer = CheckpointWriter(out, source, layout=layout, dtype=stored)
    ids = options.pop("tokens", tokens())
    report = run(source, ids, [recipe], [writer], **{"dtype": torch.float32, **options})
    writer.finish(report.kept[recipe.name])
    return report


def linears(folder: Path) -> dict[str, QuantizedWeight]:
    """The quantized Linears of a finished folder, as its own config.json says they are to be read."""
    reader = stored_linears(folder, read_config_json(folder)["quantization_config"])
    assert reader is not None
    files, found = WeightFiles(folder), {}
    names = [info.name for info in read_headers(folder)]
    for prefix in (n.removesuffix(f".{reader.required[0]}") for n in names if n.endswith(f".{reader.required[0]}")):
        parts = [p for p in (*reader.required, *reader.optional) if f"{prefix}.{p}" in files]
        tensors = files.read([f"{prefix}.{p}" for p in parts], torch.device("cpu"), None)
        found[prefix], order = reader.unpack(prefix, {p: tensors[f"{prefix}.{p}"] for p in parts})
        assert order is None
    return found


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.no_grad():
        return load_model(folder, dtype=dtype)(tokens(20, 24, seed=5)).logits
