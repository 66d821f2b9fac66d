"""What nvidia-modelopt exports for Hugging Face loaders: its configuration, and the way from stored tensors to weights.

A Linear is `weight` (codes) with `weight_scale`, and by method `weight_scale_2`, `input_scale` and `pre_quant_scale`:

| quant_algo | weight | weight_scale | more |
|---|---|---|---|
| W8A16 | I8 (out, in) | float (out,) | |
| W8A8_SQ_PER_CHANNEL | I8 (out, in) | float (out,) | input_scale, pre_quant_scale |
| FP8 | F8_E4M3 (out, in) | float () | input_scale |
| W4A16_AWQ | U8 (out / 2, in): two rows in a byte, the even one low | float (out, groups) | pre_quant_scale |
| W4A8_AWQ | the same | the same | weight_scale_2 (), input_scale, pre_quant_scale |
| NVFP4 | U8 (out, in / 2): two inputs in a byte, the even one low | F8_E4M3 (out, in / 16) | as W4A8_AWQ, no factors |

`pre_quant_scale` multiplies the inputs; where the method folds it into the norm before, it is not stored.

Source: nvidia-modelopt 0.47, its export of unified Hugging Face checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError, ModelError
from backend.formats.modelopt_layout import ALGORITHMS, FP8_ALGO, METHOD, NVFP4_ALGO, NVFP4_BLOCK, W4A8
from backend.formats.modelopt_linear import E2M1, FP8, INT8, NVFP4, ModeloptWeight, to_e4m3
from backend.formats.regular import read_regular

HF_QUANT_CONFIG = "hf_quant_config.json"
MAX_CONFIG_BYTES = 20_000_000
ROUNDING = {"W8A8_SQ_PER_CHANNEL": INT8, FP8_ALGO: FP8, W4A8: FP8, NVFP4_ALGO: NVFP4}


@dataclass(frozen=True)
class ModeloptConfig:
    """The quantization of a checkpoint.

    Attributes:
        algorithm: `quant_algo`, one of `ALGORITHMS`.
        group_size: Inputs that share a scale; None if the configuration does not say.
        ignore: Modules that stay in 16 bits; `*` stands for any text.
    """

    algorithm: str
    group_size: int | None
    ignore: tuple[str, ...]

    def ignores(self, module: str) -> bool:
        """Whether a module stays in 16 bits."""
        return any(module == name or fnmatchcase(module, name) for name in self.ignore)


def older_config(folder: Path) -> dict[str, Any] | None:
    """What hf_quant_config.json says, as a `quantization_config`; None if there is no such file.

    Raises:
        ModelError: If it is not of modelopt.
    """
    path = folder / HF_QUANT_CONFIG
    if not path.is_file():
        return None
    try:
        found = json.loads(read_regular(path, MAX_CONFIG_BYTES).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({error}); export the model again.") from None
    if not isinstance(found, dict) or not isinstance(found.get("quantization"), dict):
        raise ModelError(f"{path} has no object `quantization`; export the model again.")
    return {"quant_method": METHOD, **_flat(found)}


def parse_config(folder: Path, config: Mapping[str, Any]) -> ModeloptConfig:
    """The quantization of a folder from its `quantization_config`, completed by hf_quant_config.json.

    Raises:
        ModelError: If the algorithm is unknown, or the two files contradict each other.
        CheckpointError: If the key-value cache is quantized too.
    """
    flat = _flat(config)
    older = older_config(folder) or {}
    algorithm = flat.get("quant_algo")
    if algorithm not in ALGORITHMS:
        raise ModelError(
            f"{folder}/config.json: quant_algo {algorithm!r} of modelopt; supported are {', '.join(ALGORITHMS)}."
        )
    if older.get("quant_algo", algorithm) != algorithm:
        raise ModelError(
            f"{folder}: config.json says quant_algo {algorithm!r}, {HF_QUANT_CONFIG} {older['quant_algo']!r}; "
            "the files are of two exports. Export the model again."
        )
    for key in ("kv_cache_quant_algo", "kv_cache_scheme"):
        if found := flat.get(key) or older.get(key):
            raise CheckpointError(
                f"{folder}: {key} is {str(found)[:80]!r}; a quantized key-value cache cannot be evaluated here. "
                "Export the model without it."
            )
    group_size = flat.get("group_size", older.get("group_size"))
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise ModelError(f"{folder}/config.json: group_size {group_size!r}; it must be a positive number.")
    ignore = flat.get("ignore", older.get("ignore", []))
    if not isinstance(ignore, list) or not all(isinstance(name, str) for name in ignore):
        raise ModelError(f"{folder}/config.json: ignore is {str(ignore)[:80]!r}; it must be a list of names.")
    return ModeloptConfig(str(algorithm), group_size, tuple(ignore))


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the keys of its newest form, whichever form it has."""
    nested = config.get("quantization")
    flat = {**config, **nested} if isinstance(nested, dict) else dict(config)
    if "exclude_modules" in flat:
        flat.setdefault("ignore", flat["exclude_modules"])
    return flat


def unpack(tensors: Mapping[str, Tensor], config: ModeloptConfig) -> ModeloptWeight:
    """The weight of a Linear and what happens to its inputs.

    Args:
        tensors: Its parts by name.
        config: Of the checkpoint.

    Raises:
        CheckpointError: If parts are missing, of another type or shape, or not finite and positive.
    """
    name = config.algorithm
    kind, asks = ALGORITHMS[name].weight, ALGORITHMS[name].parts
    for part in asks:
        if part not in tensors:
            raise CheckpointError(f"lacks {part}, which {name} needs; export the model again.")
    for part in ("weight_scale_2", "input_scale"):
        if part in tensors and part not in asks:
            raise CheckpointError(f"has {part}, which {name} does not know; the configuration is of another export.")
    weight, scale = tensors["weight"], tensors["weight_scale"]
    if weight.dtype != _TYPES[kind] or weight.dim() != 2:
        raise CheckpointError(
            f"weight is {_told(weight)}; {name} stores {str(_TYPES[kind]).removeprefix('torch.')} of two dimensions."
        )
    doubles = {part: _scalar(part, tensors[part]) for part in ("weight_scale_2", "input_scale") if part in tensors}
    if not scale.is_floating_point():
        raise CheckpointError(f"weight_scale is {_told(scale)}; scales are floating-point numbers.")
    _check_scale("weight_scale", scale)
    if kind == "F8_E4M3":
        values = weight.float() * _scalar("weight_scale", scale)
    elif kind == "I8":
        values = weight.float() * _shaped(scale, (weight.shape[0],)).unsqueeze(1)
    elif name == NVFP4_ALGO:
        _check_group(config, NVFP4_BLOCK)
        codes = torch.stack((weight & 15, weight >> 4), dim=2).flatten(1)
        steps = _shaped(scale, (codes.shape[0], codes.shape[1] // NVFP4_BLOCK)) * doubles["weight_scale_2"]
        values = _times(_e2m1(codes), steps, NVFP4_BLOCK)
    else:
        values = _int4(weight, scale, config, doubles.get("weight_scale_2"))
    if not values.isfinite().all():
        raise CheckpointError("weight holds NaN or infinity; export the model again.")
    factors = tensors.get("pre_quant_scale")
    if factors is not None:
        _check_scale("pre_quant_scale", factors)
        if factors.shape != (values.shape[1],):
            raise CheckpointError(f"pre_quant_scale is {_told(factors)}; the weight has {values.shape[1]} inputs.")
    return ModeloptWeight(values, name, factors, doubles.get("input_scale"), ROUNDING.get(name, ""))


def _int4(weight: Tensor, scale: Tensor, config: ModeloptConfig, double: Tensor | None) -> Tensor:
    """Codes -8 to 7 times the steps of their groups, (out, in).

    With `weight_scale_2` the products are rounded to FP8: that is what 8-bit kernels multiply with.
    """
    codes = torch.stack((weight & 15, weight >> 4), dim=1).flatten(0, 1).to(torch.int8)
    codes = torch.where(codes > 7, codes - 16, codes).float()
    out, width = codes.shape
    groups = scale.shape[1] if scale.dim() == 2 else 0
    group_size = config.group_size or (width // groups if groups else 0)
    if not group_size or width % group_size:
        raise CheckpointError(
            f"weight_scale is {_told(scale)}; {width} inputs do not fall into groups of {group_size or 'any size'}."
        )
    values = _times(codes, _shaped(scale, (out, width // group_size)), group_size)
    return values if double is None else to_e4m3(values / double) * double


def _times(values: Tensor, steps: Tensor, group_size: int) -> Tensor:
    return (values.unflatten(1, (-1, group_size)) * steps.unsqueeze(2)).flatten(1)


def _e2m1(codes: Tensor) -> Tensor:
    table = torch.tensor(E2M1, device=codes.device)
    return torch.cat((table, -table))[codes.long()]


def _shaped(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    if scale.shape != shape:
        raise CheckpointError(f"weight_scale is {_told(scale)}; the weight's shape asks for {shape}.")
    return scale.float()


def _scalar(part: str, value: Tensor) -> Tensor:
    if value.numel() != 1 or not value.is_floating_point():
        raise CheckpointError(f"{part} is {_told(value)}; it must be one floating-point number.")
    _check_scale(part, value)
    return value.float().reshape(())


def _check_scale(part: str, value: Tensor) -> None:
    if not value.is_floating_point():
        raise CheckpointError(f"{part} is {_told(value)}; scales are floating-point numbers.")
    values = value.float()
    if not (values.isfinite() & (values > 0)).all():
        raise CheckpointError(f"{part} holds numbers that are not positive and finite; export the model again.")


def _check_group(config: ModeloptConfig, size: int) -> None:
    if config.group_size not in (None, size):
        raise CheckpointError(f"group_size is {config.group_size}; {config.algorithm} has {size}.")


def _told(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


_TYPES = {"I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn}
