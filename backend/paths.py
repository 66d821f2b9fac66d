"""Where everything lives on disk.

The home folder holds `jobs.db` and `user_data/`. A job's finished artefact lies where the guides put it,
`user_data/jobs/<JOB_SERVICE>/<JOB_ID>`; what the job needs while it works (its file, events, results of
stages) lies in `user_data/.quantdeck/runs/<uid>`, on the same file system, so that publishing is a rename.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from backend.schema import JobConfig

PROJECT = Path(__file__).resolve().parent.parent
HOME_VARIABLE = "QUANTDECK_HOME"


@dataclass(frozen=True)
class Home:
    """The folder of one Quantdeck: its job store and everything its jobs write.

    Attributes:
        root: The home folder, absolute.
    """

    root: Path

    @classmethod
    def at(cls, folder: str | os.PathLike[str] | None = None) -> Home:
        """The home at a folder, else at `QUANTDECK_HOME`, else the project folder itself."""
        chosen = folder or os.environ.get(HOME_VARIABLE) or PROJECT
        return cls(Path(chosen).expanduser().resolve())

    @classmethod
    def default(cls) -> Home:
        """The home at `QUANTDECK_HOME` or the project folder."""
        return cls.at()

    @property
    def jobs_db(self) -> Path:
        """The SQLite file of all jobs."""
        return self.root / "jobs.db"

    @property
    def user_data(self) -> Path:
        """The default `USER_FOLDER`."""
        return self.root / "user_data"

    @property
    def private(self) -> Path:
        """Quantdeck's own working files."""
        return self.user_data / ".quantdeck"

    def run_dir(self, uid: str) -> Path:
        """Working folder of one job."""
        return self.private / "runs" / uid

    def artefact_dir(self, config: JobConfig) -> Path:
        """Where the job's quantized model is published."""
        return self.root / config.USER_FOLDER / "jobs" / config.JOB_SERVICE / config.JOB_ID

    def log_file(self, config: JobConfig) -> Path:
        """The job's log, in the guide's place."""
        folder = config.LOGGING_PATH or f"{config.USER_FOLDER}/logs/{config.JOB_ID}"
        return self.root / folder / "log.log"

    def cache_dir(self, config: JobConfig) -> Path:
        """Where downloads of this job are cached."""
        return self.root / (config.CACHE_PATH or f"{config.USER_FOLDER}/.cache")

    def evaluation_cache(self) -> Path:
        """Where baseline measurements are kept for reuse."""
        return self.user_data / "evals" / ".cache"
