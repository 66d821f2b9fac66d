"""What the stages of one attempt at a job know and make, and what of an earlier attempt can be used again.

A stage's result is a JSON file of the run folder. Beside it lies a `.done` file with the stage's content key (a
digest of everything that the result depends on) and its cost. A later attempt takes a result over if its file is
unchanged and the key, computed anew from what is there now, is the same.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.evaluate.cache import file_digest
from backend.files import write_json
from backend.jobs.outcomes import Outcome
from backend.jobs.program import Command
from backend.jobs.store import Job
from backend.paths import Home
from backend.schema import JobConfig

Cost = dict[str, float]


@dataclass
class Run:
    """One attempt at a job.

    Attributes:
        configurations: What is to be made, in the order of the YAML; at least one.
        stage: The present stage, for people.
        timings: Per stage `wall_s` and `cpu_s`, seconds. Of a stage that is done once per configuration: the sums,
            and `configurations` with the single ones.
        peak_rss_bytes: Largest resident memory of any stage's process.
        failures: Configurations that could not be made or measured, and why.
        outcomes: The same as codes.
        not_possible: Why something that the job asked for cannot be done on this machine -> the configurations.
        result: What `Job.result` becomes.
    """

    home: Home
    job: Job
    config: JobConfig
    run_dir: Path
    configurations: tuple[Configuration, ...]
    stage: str = "start"
    timings: dict[str, dict[str, Any]] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    failures: dict[str, str] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    not_possible: dict[str, list[str]] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def several(self) -> bool:
        """Whether there is more than one configuration."""
        return len(self.configurations) > 1

    @property
    def staging(self) -> Path:
        """Where the quantize stage writes, one folder per configuration, before publication."""
        return self.run_dir / "out.tmp"

    @property
    def checkpoint_dir(self) -> Path:
        """Where an engine that can go on in the middle keeps what it needs for that."""
        return self.run_dir / "checkpoint"

    @property
    def artefact(self) -> Path | None:
        """Folder of the first published model, once there is one."""
        return Path(self.result["artefact"]) if "artefact" in self.result else None

    def target(self, configuration: Configuration) -> Path:
        """Where a configuration's model is published: the job's folder, or one below it if there are several."""
        folder = self.home.artefact_dir(self.config)
        if configuration.folder is not None:
            return folder / configuration.folder
        return folder / configuration.name if self.several else folder

    def entry(self, configuration: Configuration) -> dict[str, Any] | None:
        """The published configuration's part of the result; None if there is none of it."""
        return next((entry for entry in self.result.get("results", []) if entry["name"] == configuration.name), None)

    def told_failures(self) -> str:
        """Which configurations were not made or measured, and why."""
        told = "; ".join(f"{name}: {reason}" for name, reason in self.failures.items())
        made = {entry["name"] for entry in self.result.get("results", [])}
        every, lost = len(self.configurations), [c.name for c in self.configurations if c.name not in made]
        kept = f"All models but {', '.join(lost)} are saved" if lost else "All models are saved"
        kept = kept if made else "No model is saved"
        return (
            f"{len(self.failures)} of {every} configurations could not be {'made' if lost else 'measured'}. {told}. "
            f"{kept} and the others' results are kept; resuming does what is missing"
        )

    # -- results of stages, by the name of their file

    def result_file(self, name: str) -> Path:
        """Where a stage's program leaves its result."""
        return self.run_dir / "results" / f"{name}.json"

    def stage_result(self, name: str) -> dict[str, Any]:
        """What a finished stage left."""
        return json.loads(self.result_file(name).read_text(encoding="utf-8"))

    def program(self, name: str, module: str, request: dict[str, Any]) -> Command:
        """Write a stage's request and return the command that serves it, with our own Python."""
        request_file = self.run_dir / "requests" / f"{name}.json"
        write_json(request_file, request)
        self.result_file(name).parent.mkdir(parents=True, exist_ok=True)
        return Command((sys.executable, "-m", module, str(request_file), str(self.result_file(name))))

    def _done_file(self, name: str) -> Path:
        return self.run_dir / "results" / f"{name}.done"

    def keep(self, name: str, key: str, cost: Cost) -> None:
        """Mark a stage's result as complete, for later attempts."""
        done = {"key": key, "result": file_digest(self.result_file(name)), "cost": cost}
        write_json(self._done_file(name), done)

    def kept(self, name: str, key: str, *, of_any_key: bool = False) -> Cost | None:
        """The cost of an earlier attempt's result if it is unchanged and of the same key, else None."""
        try:
            done = json.loads(self._done_file(name).read_text(encoding="utf-8"))
            intact = (of_any_key or done["key"] == key) and done["result"] == file_digest(self.result_file(name))
            return done["cost"] if intact else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # absent or damaged: the stage is done again

    def forget(self, name: str) -> None:
        """Remove what an earlier attempt left of a stage."""
        self._done_file(name).unlink(missing_ok=True)
        self.result_file(name).unlink(missing_ok=True)

    # -- measuring again

    @property
    def keeps_models(self) -> bool:
        """Whether published models stay as they are, though packages or inputs have changed since."""
        return self.job.redo == "measure"

    @property
    def _redo_file(self) -> Path:
        return self.run_dir / "redo.json"

    def begin_redo(self) -> None:
        """Forget what is to be measured again, unless an attempt that died has begun with it already."""
        if not self.keeps_models:
            self.end_redo()
            return
        if self._redo_file.exists():
            return
        for path in self.run_dir.glob("results/*.*"):
            if path.name.startswith(("evaluate_", "benchmark")):
                path.unlink()
        write_json(self._redo_file, {"since_attempt": self.job.attempt})

    def end_redo(self) -> None:
        """Note that the measuring asked for has come to an end, good or bad."""
        self._redo_file.unlink(missing_ok=True)

    def note_cost(self, stage: str, cost: Cost, configuration: Configuration | None = None) -> None:
        """Add a stage's cost to the timings."""
        spent = {"wall_s": cost["wall_s"], "cpu_s": cost["cpu_s"]}
        self.peak_rss_bytes = max(self.peak_rss_bytes, int(cost.get("peak_rss_bytes", 0)))
        if configuration is None or not self.several:
            self.timings[stage] = spent
            return
        total = self.timings.setdefault(stage, {"wall_s": 0.0, "cpu_s": 0.0, "configurations": {}})
        total["configurations"][configuration.name] = spent
        for clock in ("wall_s", "cpu_s"):
            total[clock] = round(sum(one[clock] for one in total["configurations"].values()), 3)
