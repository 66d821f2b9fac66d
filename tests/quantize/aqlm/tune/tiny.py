"""A small language, a model that learned it, and its AQLM checkpoint: what the tests of tuning share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from backend.formats.config import read_config_json
from backend.formats.headers import read_headers
from backend.formats.loader import load_model
from backend.formats.size import artefact_order, drop_tied_head, is_layer_linear
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import fit
from backend.quantize.aqlm.tune.api import tune
from backend.quantize.aqlm.tune.divergence import divergence
from backend.quantize.aqlm.tune.report import TuneReport
from backend.quantize.aqlm.tune.settings import TuneSettings
from backend.quantize.weights import WeightFiles
from tests.quantize.models import VOCABULARY, config

LENGTH = 32
SCHEME = AdditiveScheme(2, 4, 8)  # one bit per weight
BRISK: dict[str, Any] = {  # moves far in few steps
    "max_epochs": 4, "batch_size": 8, "lr": 3e-3, "code_lr": 2e-2, "code_trust_ratio": 0.05, "eval_every_steps": 4,
    "save_every_steps": 3, "amp_dtype": "float32",
}  # fmt: skip


def text(samples: int, seed: int, length: int = LENGTH) -> Tensor:
    """Walks on a fixed random graph in which every token has a few likely successors: int64 (samples, length)."""
    odds = torch.rand(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(0)).pow(-1.5)
    odds.diagonal().zero_()
    generator = torch.Generator().manual_seed(seed)
    walk = [torch.randint(0, VOCABULARY, (samples,), generator=generator)]
    for _ in range(length - 1):
        walk.append(torch.multinomial(odds[walk[-1]].clamp(max=1e4), 1, generator=generator)[:, 0])
    return torch.stack(walk, 1)


TRAIN, VALIDATION, TEST = text(48, 1), text(16, 2), text(48, 3)


def trained(folder: Path, kind: str = "llama", **changes: Any) -> Path:
    """A model that has learned the language a little, in `folder`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(kind, **changes))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    ids = text(800, 4)
    for batch in ids.split(16):
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def quantized(source: Path, folder: Path, scheme: AdditiveScheme = SCHEME) -> Path:
    """Its AQLM checkpoint, with the codes that are nearest to the weights."""
    writer = CheckpointWriter(folder, source, layout="aqlm", dtype="float16")
    infos = {info.name: info for info in drop_tied_head(read_headers(source), read_config_json(source))}
    files, kept = WeightFiles(source), {}
    for name in sorted(infos, key=artefact_order):
        tensor = files.read([name], torch.device("cpu"), torch.float32)[name]
        prefix = name.removesuffix(".weight")
        if not is_layer_linear(name, infos[name].shape):
            if not name.endswith("_proj.bias"):
                writer.add(name, tensor)
        elif (misfit := scheme.misfit(*tensor.shape)) is not None:
            kept[prefix] = misfit
            writer.add(name, tensor)
        else:
            found = fit(tensor, torch.eye(tensor.shape[1]), scheme, PRESETS["fast"], seed=0)
            writer.add_additive(prefix, found.weight)
    for name in (n for n in infos if n.endswith("_proj.bias")):
        writer.add(name, files.read([name], torch.device("cpu"), torch.float32)[name])
    writer.finish(kept)
    return folder


def tuned(base: Path, start: Path, out: Path, *, finish: bool = True, **options: Any) -> TuneReport:
    """Tune into `out`; options of settings and of `tune`."""
    keys = ("checkpoint_dir", "processes", "on_step", "on_stage", "memory_limit", "device")
    told = {key: options.pop(key) for key in keys if key in options}
    train, validation = options.pop("train", TRAIN), options.pop("validation", VALIDATION)
    writer = CheckpointWriter(out, base, layout="aqlm", dtype="float16")
    report = tune(base, start, train, validation, TuneSettings(**(BRISK | options)), writer, **told)
    if finish:
        writer.finish(report.kept)
    return report


@torch.no_grad()
def mean_divergence(base: Path, other: Path, tokens: Tensor = TEST) -> float:
    """Of two folders on text that neither training nor selection has seen, nats per token, in float32."""
    teacher, student = (load_model(folder, dtype=torch.float32)(tokens).logits for folder in (base, other))
    return float(divergence(teacher, student, gradient=False)[0]) / tokens.numel()
