"""What an interrupted tuning needs to go on with the same bits.

Tensors lie in safetensors files that are written under another name and renamed; `progress.json`, written last, names
those that count. Each process has a file of its own for the state; the best model so far is one file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from backend.errors import CheckpointError
from backend.files import sync_path, write_json
from backend.formats.spool import writing
from backend.quantize.aqlm.tune.group import Group
from backend.quantize.aqlm.tune.report import Measurement

FILE = "progress.json"


@dataclass
class History:
    """What has happened so far.

    Attributes:
        step: Steps done.
        losses: Training loss of each step, mean KL divergence in nats per token.
        changed: Part of all groups that got new codes, of each step.
        measurements: On the validation sequences.
        best_step: Steps after which the best model was there.
        notes: Deviations worth telling.
        stopped: Why it ended before its last step; None: it did not.
        finished: Nothing is left to do.
    """

    step: int = 0
    losses: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    measurements: list[Measurement] = field(default_factory=list)
    best_step: int = 0
    notes: list[str] = field(default_factory=list)
    stopped: str | None = None
    finished: bool = False


class Progress:
    """The files of one tuning.

    Args:
        folder: Where.
        key: Digest of all that decides the result; what another key left is not continued.
        group: The processes; the first one writes what is common.
    """

    def __init__(self, folder: Path, key: str, group: Group) -> None:
        self._folder, self._key, self._group = folder, key, group
        folder.mkdir(parents=True, exist_ok=True)

    def load(self) -> History | None:
        """How far an earlier process came; None if there is nothing to go on with."""
        try:
            state = json.loads((self._folder / FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(state, dict) or state.pop("key", None) != self._key:
            return None
        return History(**{**state, "measurements": [Measurement(**values) for values in state["measurements"]]})

    def state(self, step: int) -> dict[str, Tensor]:
        """This process's tensors after a step."""
        return self._read(self._state_file(step))

    def best(self, step: int) -> dict[str, Tensor]:
        """The best model, which was there after a step."""
        return self._read(self._best_file(step))

    def keep_best(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the best model so far; counts from the next `save` on."""
        if self._group.rank == 0:
            self._write(self._best_file(step), tensors)

    def save(self, history: History, tensors: Mapping[str, Tensor] | None) -> None:
        """Record how far it came. Durable when it returns.

        Args:
            history: All that has happened.
            tensors: This process's state; None: it will not be needed.
        """
        if tensors is not None:
            self._write(self._state_file(history.step), tensors)
        self._group.wait()
        if self._group.rank == 0:
            with writing(self._folder / FILE):
                write_json(self._folder / FILE, {"key": self._key, **asdict(history)})
            keep = {self._best_file(history.best_step)}
            if tensors is not None:
                keep |= {self._state_file(history.step, rank) for rank in range(self._group.size)}
            for path in (*self._folder.glob("state-*.safetensors*"), *self._folder.glob("best-*.safetensors*")):
                if path not in keep:
                    path.unlink()
        self._group.wait()

    def clear(self) -> None:
        """Forget earlier progress: files that belong to it are about to be overwritten."""
        if self._group.rank == 0:
            (self._folder / FILE).unlink(missing_ok=True)
        self._group.wait()

    def _state_file(self, step: int, rank: int | None = None) -> Path:
        return self._folder / f"state-{step}-{self._group.rank if rank is None else rank}.safetensors"

    def _best_file(self, step: int) -> Path:
        return self._folder / f"best-{step}.safetensors"

    def _read(self, path: Path) -> dict[str, Tensor]:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); remove {self._folder} and start again.") from None

    def _write(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        temporary = path.with_name(f"{path.name}.tmp")
        with writing(path):
            try:
                save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, temporary)
                sync_path(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            sync_path(path.parent)
