"""Random additive weights, straight to a writer: no format depends on where codes come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.formats.additive_weight import AdditiveWeight
from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order, drop_tied_head, is_layer_linear
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.scheme import AdditiveScheme
from tests.formats.models import stored


def random_additive(
    out: int, width: int, scheme: AdditiveScheme, seed: int = 0, dtype: torch.dtype = torch.float16
) -> AdditiveWeight:
    """Weights of about 0.08; every code occurs if there is room."""
    g = torch.Generator().manual_seed(seed)
    codes = (out, width // scheme.in_group_size, scheme.num_codebooks)
    books = (scheme.num_codebooks, scheme.words, scheme.in_group_size)
    return AdditiveWeight(
        torch.randint(0, scheme.words, codes, generator=g, dtype=torch.int32),
        (torch.randn(books, generator=g) * 0.08 / scheme.num_codebooks**0.5).to(dtype),
        (torch.rand(out, generator=g) + 0.5).to(dtype),
    )


def write_additive(
    source: Path, out: Path, scheme: AdditiveScheme, *, keep: tuple[str, ...] = ("lm_head",), **options: Any
) -> Path:
    """Give every Linear of the decoder layers that it fits a random weight of the scheme, in the pipeline's order."""
    writer = CheckpointWriter(out, source, layout="aqlm", **options)
    kept: dict[str, str] = {}
    tensors = stored(source)
    names = [t.name for t in drop_tied_head(read_headers(source), read_config_json(source))]
    for number, name in enumerate(sorted(names, key=artefact_order)):
        prefix, _, part = name.rpartition(".")
        reason = _reason(writer, scheme, prefix, tensors.get(f"{prefix}.weight"), keep)
        if reason == "":
            if part == "weight":
                weight = random_additive(*tensors[name].shape, scheme, seed=number)
                writer.add_additive(prefix, weight, tensors.get(f"{prefix}.bias"))
            continue  # its bias goes with it
        if reason and part == "weight":
            kept[prefix] = reason
        writer.add(name, tensors[name])
    return writer.finish(kept)


def _reason(
    writer: CheckpointWriter, scheme: AdditiveScheme, prefix: str, weight: Tensor | None, keep: tuple[str, ...]
) -> str | None:
    """Why a Linear of the layers is kept; empty: it is not; None: it is none."""
    if weight is None or not is_layer_linear(f"{prefix}.weight", tuple(weight.shape)):
        return None
    if any(part in prefix for part in keep):
        return "asked for"
    return writer.refusal(scheme, (weight.shape[0], weight.shape[1])) or ""
