"""What can be said about a model in milliseconds, from config.json and the safetensors headers alone.

Pages check while somebody types, so this imports no torch. `backend.quantize.check` compares every tensor with
the module tree of transformers; a job does that first of all.
"""

from __future__ import annotations

from pathlib import Path

from backend.errors import ConfigError, ModelError
from backend.formats.config import EXPERT_KEYS, read_config_json
from backend.formats.headers import TensorInfo, read_headers
from backend.formats.size import LAYER, is_quantized_linear

GROUP_SIZES = (128, 64, 32)
CONV1D_TYPES = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
SUPPORTED = "Supported are dense decoder-only models like Llama, Mistral, Qwen2 and Qwen3"


def quick_check(folder: Path, group_size: int, keep: tuple[str, ...]) -> list[TensorInfo]:
    """Refuse a model that cannot be quantized.

    Args:
        folder: Model folder.
        group_size: Weights per group.
        keep: Linears whose name contains one of these stay in 16 bits.

    Returns:
        The headers, for further use.

    Raises:
        ModelError: If it is quantized already, or of an architecture that is not supported.
        CheckpointError: If weight files are missing, truncated, corrupt or pickles.
        ConfigError: With key `Q_GROUP_SIZE` if a width does not divide into groups.
    """
    config = read_config_json(folder)
    name = (config.get("architectures") or [config.get("model_type") or "this model"])[0]
    if config.get("quantization_config"):
        raise ModelError(f"{folder} is quantized already; give the 16-bit model it was made from")
    if config.get("is_encoder_decoder"):
        raise ModelError(f"{name} cannot be quantized: it is an encoder-decoder model. {SUPPORTED}")
    for key in EXPERT_KEYS:
        if isinstance(config.get(key), int) and config[key] > 1:
            raise ModelError(
                f"{name} cannot be quantized: it is a mixture of experts ({key} = {config[key]}). {SUPPORTED}"
            )
    if config.get("model_type") in CONV1D_TYPES:
        raise ModelError(f"{name} cannot be quantized: its weights are Conv1D modules, not Linears. {SUPPORTED}")
    headers = read_headers(folder)
    linears = [t for t in headers if is_quantized_linear(t.name, t.shape, keep)]
    if not linears:
        raise ModelError(
            f"{name} cannot be quantized: no Linear weights in numbered decoder layers were found. {SUPPORTED}"
        )
    layers = {int(match.group(1)) for t in linears if (match := LAYER.search(t.name))}
    expected = config.get("num_hidden_layers")
    if isinstance(expected, int) and layers != set(range(expected)):
        raise ModelError(f"{folder} holds the weights of {len(layers)} decoder layers; config.json says {expected}")
    _check_widths(linears, group_size)
    return headers


def _check_widths(linears: list[TensorInfo], group_size: int) -> None:
    for tensor in linears:
        width = tensor.shape[1]
        if width % group_size:
            fitting = [g for g in GROUP_SIZES if all(t.shape[1] % g == 0 for t in linears)]
            advice = (
                f"use {' or '.join(map(str, fitting))}" if fitting else "this model's widths fit none of 128, 64, 32"
            )
            raise ConfigError(
                f"found {group_size}, which does not divide the {width} inputs of {tensor.name}; {advice}",
                key="Q_GROUP_SIZE",
                value=group_size,
            )
