"""How hard AQLM's layer search tries, as plain data. Imports no torch: forms and checks read it too.

Names are those of the published program where it has the parameter, with the same meaning. What only one of the two
procedures reads is marked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from backend.errors import ConfigError

FAST, REFERENCE = "fast", "reference"
PROCEDURES = (FAST, REFERENCE)


@dataclass(frozen=True)
class SearchSettings:
    """Parameters of the search for one layer's codes, codebooks and scales.

    Attributes:
        procedure: `fast`: error feedback for the codes, conjugate gradients for the codebooks, coordinate descent.
            `reference`: the published one, residual k-means, then Adam on codebooks and scales in turn with a beam
            search over codes.
        beam_size: Codings of a row that are kept while its groups are visited.
        max_epochs: Rounds of improvement after the first codes.
        steps_per_epoch: Steps on the codebooks per round: at most so many of conjugate gradients (fast), or exactly
            so many of Adam (reference).
        relative_mse_tolerance: Stop when a round lowers the loss by less than this part; None: never.
        init_max_iter: Iterations of each k-means, at most.
        init_max_points_per_centroid: Groups per codeword that k-means sees; None: all.
        lr: Of Adam (reference).
        candidates: Words of the first codebooks that are tried with their best partners, a power of two (fast).
        warm_ups: Times the codebooks are fitted to the codes of a few rows before all rows are coded (fast).
        warm_up_weights: How many weights these rows have, about (fast).
        damp: Part of the mean of H's diagonal that is added to the diagonal during the search (fast).
        act_order: Whether groups are coded in falling order of their inputs' energy (fast).

    Raises:
        ConfigError: If a value is out of range.
    """

    procedure: str = FAST
    beam_size: int = 1
    max_epochs: int = 1
    steps_per_epoch: int = 3
    relative_mse_tolerance: float | None = None
    init_max_iter: int = 4
    init_max_points_per_centroid: int | None = 32
    lr: float = 1e-4
    candidates: int = 8
    warm_ups: int = 3
    warm_up_weights: int = 131072
    damp: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        if self.procedure not in PROCEDURES:
            raise _error("procedure", self.procedure, f"one of {', '.join(PROCEDURES)}")
        for key, low in _WHOLE.items():
            value = getattr(self, key)
            if value is None and key == "init_max_points_per_centroid":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise _error(key, value, f"whole numbers from {low}")
        if self.candidates & (self.candidates - 1):
            raise _error("candidates", self.candidates, "powers of two")
        tolerance = self.relative_mse_tolerance
        if tolerance is not None and not 0 <= tolerance < 1:
            raise _error("relative_mse_tolerance", tolerance, "null, or numbers from 0 up to but not 1")
        if not self.lr > 0:
            raise _error("lr", self.lr, "numbers above 0")
        if not 0 < self.damp <= 1:
            raise _error("damp", self.damp, "numbers above 0, up to 1")

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SearchSettings:
        """From what `to_dict` gave; keys that are missing have their defaults.

        Raises:
            ConfigError: If a key is unknown or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        for key in values:
            if key not in known:
                raise _error(key, values[key], f"the keys {', '.join(sorted(known))}")
        return cls(**values)


_WHOLE = {
    "beam_size": 1,
    "max_epochs": 0,
    "steps_per_epoch": 1,
    "init_max_iter": 1,
    "init_max_points_per_centroid": 1,
    "candidates": 1,
    "warm_ups": 0,
    "warm_up_weights": 1,
}


def _error(key: str, value: object, allowed: str) -> ConfigError:
    return ConfigError(f"found {value!r}; allowed are {allowed}", key=key, value=value)


PRESETS: dict[str, SearchSettings] = {
    "fast": SearchSettings(
        max_epochs=0, warm_ups=2, warm_up_weights=65536, candidates=4, init_max_points_per_centroid=16
    ),
    "default": SearchSettings(),
    "thorough": SearchSettings(max_epochs=4, beam_size=4, candidates=16, warm_ups=4),
    "reference": SearchSettings(
        procedure=REFERENCE,
        max_epochs=100,
        steps_per_epoch=100,
        relative_mse_tolerance=0.01,
        init_max_iter=100,
        init_max_points_per_centroid=None,
    ),
}
"""Efforts by name. `reference` has the parameters of the AQLM guide."""
