"""The models that a job makes: where their programs work, whether they are there, and how they are published.

Every maker of models (`one_program`, `aqlm_stages`) describes each result as a `Making`.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.errors import JobError
from backend.evaluate.metrics import versions
from backend.files import write_json
from backend.formats.size import weight_bytes
from backend.jobs.devices import describe_device
from backend.jobs.publish import check_manifest, publish, read_manifest
from backend.jobs.run import Run
from backend.jobs.stage import Stage

CONFIG_FILE = "quantdeck.yaml"
PACKAGES = (
    "torch", "transformers", "llmcompressor", "compressed-tensors", "lm_eval", "datasets", "safetensors", "aqlm",
    "nvidia-modelopt",
)  # fmt: skip

log = logging.getLogger("quantdeck.runner")


@dataclass(frozen=True)
class Making:
    """How one configuration's model comes to be.

    Attributes:
        configuration: What is made.
        key: Digest of everything that the model depends on.
        told: What its program tells of it: `layers`, `skipped`, `notes`, `tokens`; more is kept beside these.
    """

    configuration: Configuration
    key: Callable[[Run], str]
    told: Callable[[Run], dict[str, Any]]

    def publish_stage(self, *, may_fail: bool = False) -> Stage:
        """The stage that saves the model."""
        finish = partial(publish_model, making=self)
        return Stage("publish", "Save", finish=finish, configuration=self.configuration, may_fail=may_fail)

    def is_there(self, run: Run) -> bool:
        """Whether the model lies where its program has written it, or is published."""
        return staged(run, self.configuration).is_dir() or self.is_published(run)

    def is_published(self, run: Run) -> bool:
        """Whether the model is in its place, made by this very work and unchanged since.

        To measure a model again it is enough that the job made it, with whatever versions of packages.
        """
        return is_published(run, run.target(self.configuration), self.key(run))

    def check_place(self, run: Run) -> None:
        """Refuse to make the model where another one already is.

        Raises:
            JobError: With what to do.
        """
        target = run.target(self.configuration)
        if target.exists() and not self.is_published(run):
            raise JobError(
                f"{target} holds a model that was made from other inputs or was changed since; nothing was "
                "overwritten. Start the job anew under another name (Clone)"
            )


def staged(run: Run, configuration: Configuration) -> Path:
    """Where a configuration's program writes its model."""
    return run.staging / configuration.name


def is_published(run: Run, target: Path, key: str) -> bool:
    """Whether a folder was published by this job, of this content, and is unchanged."""
    manifest = read_manifest(target) or {}
    if manifest.get("job") != run.job.uid:
        return False
    if not run.keeps_models and manifest.get("content_key") != key:
        return False
    return check_manifest(target) == []


def prepare_folders(run: Run, name: str, key: str, *, outputs: Sequence[Path], checkpoint: Path) -> None:
    """Keep what a program has finished if it belongs to exactly this work, else start from empty folders.

    Args:
        run: The attempt.
        name: Name of the stage.
        key: Its content key.
        outputs: Where the program writes.
        checkpoint: Where it keeps what it needs to go on.
    """
    note = run.run_dir / ("checkpoint.json" if name == "quantize" else f"checkpoint-{name}.json")
    started = note.exists()
    same = started and json.loads(note.read_text(encoding="utf-8")) == {"key": key}
    kept = checkpoint.is_dir() and any(checkpoint.iterdir())
    engine = run.configurations[0].engine
    if same and kept and all(folder.is_dir() for folder in outputs):
        log.info("%s: goes on after what engine %s has finished", name, engine)
        return
    if started and not same:
        log.info("%s: starts from the beginning, since the model, the text or a package has changed", name)
    elif started:
        log.info("%s: starts from the beginning, since engine %s has kept nothing", name, engine)
    for folder in (*outputs, checkpoint):
        shutil.rmtree(folder, ignore_errors=True)
    for folder in (run.staging, checkpoint):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(note, {"key": key})


def bytes_to_write(run: Run, configurations: Sequence[Configuration]) -> tuple[Path, int]:
    """The staging folder, and a bound: no quantized model is larger than the 16-bit one."""
    written = sum(path.stat().st_size for path in run.staging.rglob("*") if path.is_file())
    whole = len(configurations) * weight_bytes(run.stage_result("download")["model_dir"])
    return run.staging, max(0, whole - written)


def publish_model(run: Run, making: Making) -> None:
    """Save a finished model in its place, if it is not there yet, and note it in the job's result."""
    inputs, configuration, told = run.stage_result("download"), making.configuration, making.told(run)
    target = run.target(configuration)
    facts = {
        **facts_of(run, making.key(run)),
        "configuration": {"name": configuration.name, "label": configuration.label, "engine": configuration.engine},
        "calibration": {"sequences": inputs["samples"], "tokens": told["tokens"]},
        "notes": told.get("notes", []),
    }
    manifest = publish_folder(run, staged(run, configuration), target, facts)
    entry = {
        "name": configuration.name, "label": configuration.label, "artefact": str(target),
        "bytes": weight_bytes(target), "manifest": manifest, "layers": told["layers"], "skipped": told["skipped"],
        "notes": told.get("notes", []), "rows": [], "table": "", "reason": None,
        **{key: value for key, value in told.items() if key in ("tuning", "check")},
    }  # fmt: skip
    run.result.setdefault("results", []).append(entry)
    if len(run.result["results"]) == 1:
        run.result.update(
            {key: entry[key] for key in ("artefact", "manifest", "layers", "skipped", "notes")},
            model_dir=inputs["model_dir"], device=facts["device"], versions=facts["versions"],
            samples=inputs["samples"], samples_wanted=inputs["samples_wanted"],
        )  # fmt: skip


def facts_of(run: Run, key: str) -> dict[str, Any]:
    """What the manifest of every published folder tells of its job."""
    return {
        "job": run.job.uid,
        "job_id": run.job.job_id,
        "model": run.job.model,
        "model_commit": run.stage_result("download")["model_commit"],
        "algorithm": run.job.algorithm,
        "device": describe_device(run.job.device),
        "versions": {"python": platform.python_version(), **versions(*PACKAGES)},
        "content_key": key,
    }


def publish_folder(run: Run, source: Path, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Publish a finished folder with the job's file in it, unless that was done before; returns its manifest."""
    if is_published(run, target, facts["content_key"]):
        log.info("%s was already saved", target)
        shutil.rmtree(source, ignore_errors=True)
        manifest = read_manifest(target)
        assert manifest is not None  # it is published
        return manifest
    (source / CONFIG_FILE).write_text(run.job.config_yaml, encoding="utf-8")
    return publish(source, target, facts)
