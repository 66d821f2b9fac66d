"""What all algorithms' sections of a job file have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel

from backend.schema.fields import Group
from backend.schema.measurement import CalibrationSettings


class AlgorithmSection(BaseModel):
    """The settings of one algorithm, below `llm:`.

    Attributes:
        GROUPS: How a form lays them out; empty: simple ones, then all others.
    """

    GROUPS: ClassVar[tuple[Group, ...]] = ()

    @property
    def calibration_size(self) -> Mapping[str, Any]:
        """Keys of CALIBRATION that this section says itself, unless the file has them there too."""
        return {}

    def check_job(self, calibration: CalibrationSettings, n_gpus: int) -> None:
        """Rules between this section and the rest of the file.

        Args:
            calibration: How much text is read.
            n_gpus: How many GPUs CUDA_ID lists.

        Raises:
            ProblemAt: With the whole key.
        """
