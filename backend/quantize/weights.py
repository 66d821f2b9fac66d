"""Reads tensors of a checkpoint by name, so that no more of it is in memory than is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from backend.errors import CheckpointError, ModelError
from backend.formats.headers import read_headers

STORED_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """The tensors of a checkpoint; a file is mapped only while it is read.

    Args:
        model_dir: Folder with safetensors.
    """

    def __init__(self, model_dir: Path) -> None:
        self._folder = model_dir
        self._stored = {info.name: info for info in read_headers(model_dir)}

    def __contains__(self, name: str) -> bool:
        return name in self._stored

    def dtype(self, name: str) -> torch.dtype:
        """The type in which a tensor is stored."""
        return STORED_DTYPES[self._stored[name].dtype]

    def read(self, names: list[str], device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
        """Copies of the named tensors on a device, cast to `dtype` (None: as stored).

        Raises:
            CheckpointError: If a file has become unreadable.
            ModelError: If a tensor holds NaN or infinity.
        """
        tensors: dict[str, Tensor] = {}
        for file in sorted({self._stored[name].file for name in names}):
            path = self._folder / file
            try:
                with safe_open(str(path), framework="pt", device="cpu") as mapped:
                    for name in (n for n in names if self._stored[n].file == file):
                        stored = mapped.get_tensor(name)
                        tensors[name] = stored.to(device, dtype or stored.dtype, copy=True)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read: {error}") from None
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
                _refuse(name, tensor)
        return tensors


def _refuse(name: str, tensor: Tensor) -> None:
    """The sum of finite values can overflow, so look again before saying so."""
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise ModelError(
            f"{name} holds {bad} values that are NaN or infinite; the checkpoint is damaged. Get it again."
        )
