"""What an interrupted run needs to go on after its last finished layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backend.errors import CheckpointError
from backend.files import write_json
from backend.formats.headers import read_headers
from backend.quantize.recipe import Recipe
from backend.quantize.report import LayerReport

FILE = "progress.json"
VERSION = 2  # of what the files mean; another version starts again


def fingerprint(
    model_dir: Path, tokens: Tensor, lengths: Tensor | None, recipes: Sequence[Recipe], **settings: Any
) -> str:
    """A digest of everything that decides the result: a checkpoint of other inputs is not continued.

    Weight files count by their headers, sizes and times of change.
    """
    files = sorted({info.file for info in read_headers(model_dir)})
    facts = {
        "version": VERSION,
        "torch": torch.__version__,
        "config": (model_dir / "config.json").read_text(encoding="utf-8"),
        "files": [(name, (model_dir / name).stat().st_size, (model_dir / name).stat().st_mtime_ns) for name in files],
        "recipes": [recipe.to_dict() for recipe in recipes],
        **settings,
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in (tokens, lengths):
        if tensor is not None:
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


class Checkpoint:
    """Progress of one run, rewritten after each layer.

    Args:
        folder: Where it is kept.
        key: `fingerprint` of the run.
        report: The dataclass that reports on a layer.
    """

    def __init__(self, folder: Path, key: str, report: type[Any] = LayerReport) -> None:
        self._path, self._key, self._report = folder / FILE, key, report

    def load(self) -> dict[str, Any] | None:
        """`layer` (finished layers), `reports`, `kept`, `writers` of an earlier process; None if there are none."""
        try:
            state = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(state, dict) or state.get("key") != self._key:
            return None
        plain = ({k: tuple(v) if isinstance(v, list) else v for k, v in r.items()} for r in state["reports"])
        state["reports"] = [self._report(**values) for values in plain]
        return state

    def clear(self) -> None:
        """Forget earlier progress: files that belong to it are about to be overwritten."""
        self._path.unlink(missing_ok=True)

    def save(
        self,
        layer: int,
        reports: Sequence[Any],
        kept: Mapping[str, Mapping[str, str]],
        writers: Sequence[Mapping[str, Any]],
    ) -> None:
        """Record that layers below `layer` are done. Durable when it returns."""
        state = {"key": self._key, "layer": layer, "reports": [asdict(r) for r in reports], "kept": kept}
        try:
            write_json(self._path, state | {"writers": list(writers)})
        except OSError as error:
            raise CheckpointError(
                f"{self._path} could not be written ({error.strerror}). Free some space and resume; what was finished "
                "before is kept."
            ) from error
