"""The codes found so far for the layer that is running, kept so that a killed process need not find them again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from backend.files import sync_path
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.spool import writing

FILE = "codes.safetensors"
PARTS = ("codes", "codebooks", "scales")


@dataclass(frozen=True)
class Found:
    """Codes and codebooks of one Linear, before finetuning.

    Attributes:
        weight: float32.
        error: Energy of the output error on the calibration inputs, tr(dW H dW^T).
        signal: Energy of the output, tr(W H W^T).
        notes: Of the search.
    """

    weight: AdditiveWeight
    error: float
    signal: float
    notes: tuple[str, ...]


class FoundCodes:
    """One file: tensors, and in its metadata what they belong to. It is there whole or not at all.

    Args:
        folder: Where; None: nothing is kept.
        key: `fingerprint` of the run; what another run left is not used.
    """

    def __init__(self, folder: Path | None, key: str) -> None:
        self._path, self._key = None if folder is None else folder / FILE, key

    def load(self, layer: int, device: torch.device) -> dict[str, Found]:
        """What an earlier process found for a layer: name inside the layer -> codes, on a device; empty if nothing."""
        if self._path is None or not self._path.is_file():
            return {}
        try:
            with safe_open(str(self._path), framework="pt", device=str(device)) as file:
                about = json.loads(file.metadata()["about"])
                if (about["key"], about["layer"]) != (self._key, layer):
                    return {}
                return {
                    name: Found(
                        AdditiveWeight(*(file.get_tensor(f"{name}.{part}") for part in PARTS)),
                        facts["error"], facts["signal"], tuple(facts["notes"]),
                    )
                    for name, facts in about["linears"].items()
                }  # fmt: skip
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}  # damaged: it is found again

    def save(self, layer: int, found: Mapping[str, Found]) -> None:
        """Keep what was found. Durable when it returns.

        Raises:
            CheckpointError: If the disk is full.
        """
        if self._path is None:
            return
        tensors = {
            f"{name}.{part}": getattr(entry.weight, part).cpu().contiguous()
            for name, entry in found.items()
            for part in PARTS
        }
        linears = {name: {"error": f.error, "signal": f.signal, "notes": list(f.notes)} for name, f in found.items()}
        about = {"key": self._key, "layer": layer, "linears": linears}
        data = save(tensors, {"about": json.dumps(about, allow_nan=False)})
        temporary = self._path.with_name(f"{FILE}.tmp")
        with writing(self._path):
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, self._path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_path(self._path.parent)

    def clear(self) -> None:
        """The layer is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
