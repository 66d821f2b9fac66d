"""Reads checkpoints in the GPTQ layout that GPTQModel and AutoRound write, for measurement only.

Per Linear, with I inputs, O outputs and groups of g inputs: `qweight` int32 (I * bits / 32, O), codes of one output
packed along the inputs; `qzeros` int32 (I / g, O * bits / 32), packed along the outputs; `scales` (I / g, O);
`g_idx` int32 (I,), the group of each input. W[o, i] = (q - zero) * scale. The first version of the layout stores
zero - 1, the second (`checkpoint_format: gptq_v2`) zero itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from backend.errors import CheckpointError
from backend.formats.config import read_config_json
from backend.formats.skeleton import build_skeleton, read_config


def is_gptq(settings: dict[str, Any]) -> bool:
    """Whether a `quantization_config` is of this layout; AutoRound gives it a name of its own."""
    return settings.get("quant_method") == "gptq" or settings.get("packing_format") == "auto_round:auto_gptq"


def load_gptq(folder: Path) -> nn.Module:
    """The model with dequantised float32 Linears.

    Raises:
        CheckpointError: If bits do not divide a word, or tensors are missing.
    """
    settings = read_config_json(folder)["quantization_config"]
    if settings["bits"] not in (2, 4, 8):
        raise CheckpointError(f"{folder}: GPTQ layout with {settings['bits']} bits; 2, 4 and 8 can be read.")
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(str(file))
    model = build_skeleton(read_config(folder), torch.float32)
    for name, parameter in list(model.named_parameters()):
        prefix, _, leaf = name.rpartition(".")
        if f"{prefix}.qweight" in stored and leaf == "weight":
            value = dequantize({part: stored[f"{prefix}.{part}"] for part in _parts(prefix, stored)}, settings)
        elif name in stored:
            value = stored[name].float()
        else:
            raise CheckpointError(f"{folder}: tensor {name} is in none of its files.")
        if value.shape != parameter.shape:
            raise CheckpointError(f"{name} has shape {tuple(value.shape)}, not {tuple(parameter.shape)}.")
        setattr(model.get_submodule(prefix), leaf, nn.Parameter(value, requires_grad=False))
    return model


def dequantize(parts: dict[str, Tensor], settings: dict[str, Any]) -> Tensor:
    """The weight of one Linear, float32 (out, in)."""
    bits = settings["bits"]
    q = _unpack(parts["qweight"].T, bits).T  # (in, out)
    zero = _unpack(parts["qzeros"], bits)  # (groups, out)
    if settings.get("checkpoint_format", "gptq") != "gptq_v2":
        zero = (zero + 1) % (1 << bits)
    scale = parts["scales"].float()
    group = parts["g_idx"].long() if "g_idx" in parts else torch.arange(len(q)) * len(scale) // len(q)
    return ((q - zero[group]) * scale[group]).T.contiguous()


def _parts(prefix: str, stored: dict[str, Tensor]) -> list[str]:
    return [part for part in ("qweight", "qzeros", "scales", "g_idx") if f"{prefix}.{part}" in stored]


def _unpack(words: Tensor, bits: int) -> Tensor:
    """(rows, words) int32 -> (rows, words * 32 / bits) codes, the lowest bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).flatten(1)
