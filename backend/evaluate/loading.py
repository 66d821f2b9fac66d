"""Open a model folder for measuring or chatting; the same call for baseline and quantized models.

torch is imported inside: a wrong request is refused by `check_folder` before seconds of imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from backend.errors import ConfigError
from backend.formats.headers import read_headers
from backend.quick_start import quick_import

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOADER = "backend.formats.loader"
DTYPES = ("bfloat16", "float16", "float32")


def check_folder(model_dir: Path, dtype: str | None = None) -> None:
    """Refuse a folder without readable safetensors and an unknown compute dtype, without importing torch.

    Raises:
        ConfigError: If the dtype is not one of `DTYPES`.
        ModelError, CheckpointError: If the folder is missing, or its weights are not complete safetensors.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"{dtype!r} is no compute dtype; choose {', '.join(DTYPES)}.", key="dtype", value=dtype)
    read_headers(model_dir)


def import_for(model_dir: Path, device: str = "cpu") -> None:
    """Do the imports and first-use set-up that any model of this folder's kind needs, without reading weights.

    Memory measured after this call and after loading differs by the model itself, not by libraries.
    """
    quick_import(LOADER)
    import torch

    from backend.formats.decode_path import warm_up
    from backend.formats.loader import load_tokenizer
    from backend.formats.skeleton import build_skeleton, read_config

    load_tokenizer(model_dir)
    build_skeleton(read_config(model_dir), torch.bfloat16)
    square = torch.ones(256, 256, dtype=torch.bfloat16)
    square @ square  # starts the thread pool and the matrix library
    warm_up(model_dir, device)


def open_model(
    model_dir: Path, device: str = "cpu", dtype: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from disk, in eval mode.

    Args:
        model_dir: Folder of a 16-bit or quantized model.
        device: `cpu`, `cuda` or `cuda:N`.
        dtype: Name of the compute dtype, None for the loader's default.

    Raises:
        ConfigError: If the dtype is not one of `DTYPES` or the device is not there.
        ModelError, CheckpointError: If the folder cannot be loaded.
    """
    check_folder(model_dir, dtype)
    quick_import(LOADER)
    import torch

    from backend.formats.loader import load_model, load_tokenizer

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"The device {device!r} was asked for, but torch sees no CUDA GPU. Use cpu.", key="device")
    model = load_model(model_dir, device=device, dtype=getattr(torch, dtype) if dtype else None)
    return model, load_tokenizer(model_dir)
