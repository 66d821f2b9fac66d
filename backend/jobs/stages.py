"""The stages of a job, in order, and what each needs from the ones before.

A stage either starts a program (its request and result are JSON files in the run folder) or is done by the
runner itself. The models are published before anything is measured, so nothing that fails later can lose them.
"""

from __future__ import annotations

import json
import logging
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.engines.registry import Engine, engine_for
from backend.errors import CheckpointError, JobError
from backend.evaluate.cache import digest, file_digest, model_fingerprint
from backend.evaluate.metrics import versions
from backend.evaluate.report import build_rows, format_table
from backend.files import write_json
from backend.formats.bits import StoredBits, measured_bits
from backend.formats.size import weight_bytes
from backend.jobs import measure
from backend.jobs.devices import describe_device, torch_device
from backend.jobs.program import Command
from backend.jobs.publish import check_manifest, publish, read_manifest
from backend.jobs.run import Run
from backend.sources.plan import calibration_source

CONFIG_FILE = "quantdeck.yaml"
PREPARE = "backend.sources.prepare"
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "lm_eval", "datasets", "safetensors")

log = logging.getLogger("quantdeck.runner")


def _nothing(run: Run) -> None:
    """For stages that leave nothing to do."""


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    Attributes:
        name: Name in events and timings.
        label: Name for people.
        command: The program to start, or None if `finish` does the work (or there is none to do).
        finish: Done by the runner after the program has ended well, or its result was taken over.
        key: Digest of everything that the result depends on; None for a stage that is done anew by every attempt.
        intact: Whether what the stage made beside its result file still is there.
        configuration: The one that the stage is about; None if it is about the whole job.
        makes_models: Whether it makes the models that `publish` saves.
        may_fail: Whether the job goes on with the other configurations if the stage fails.
        writes: Where the stage writes most, and the bytes that it still has to write at most; for a full disk.
    """

    name: str
    label: str
    command: Callable[[Run], Command | None] = lambda run: None
    finish: Callable[[Run], None] = _nothing
    key: Callable[[Run], str] | None = None
    intact: Callable[[Run], bool] = lambda run: True
    configuration: Configuration | None = None
    makes_models: bool = False
    may_fail: bool = False
    writes: Callable[[Run], tuple[Path, int | None]] = lambda run: (run.run_dir, None)

    @property
    def file(self) -> str:
        """Name of the stage's request and result, without its ending."""
        return measure.file_name(self.name, self.configuration)


def stages_of(run: Run) -> list[Stage]:
    """The stages that this job needs."""
    each = run.configurations
    stages = [
        Stage("download", "Load model and text", _download, _note_inputs, _download_key, _inputs_are_intact),
        Stage(
            "quantize",
            "Quantize",
            _quantize,
            _note_quantize,
            _quantize_key,
            _models_are_there,
            makes_models=True,
            writes=_models_to_write,
        ),  # fmt: skip
        *(Stage("publish", "Save", finish=partial(_publish, configuration=c), configuration=c) for c in each),
    ]
    if measure.evaluates(run):
        stages.append(
            Stage(
                "evaluate_baseline", "Evaluate baseline", measure.evaluate_baseline, measure.keep_baseline,
                measure.baseline_key,
            )
        )  # fmt: skip
        stages += [_measured(run, c, "evaluate_quantized", "Evaluate quantized") for c in each]
    if run.config.EVALUATION.compares_outputs:
        stages += [_measured(run, c, "evaluate_fidelity", "Compare outputs") for c in each]
    if run.config.BENCHMARK.ENABLED:
        stages += [_measured(run, c, "benchmark", "Benchmark") for c in each]
    return [*stages, Stage("report", "Report", finish=_report)]


def _measured(run: Run, configuration: Configuration, name: str, label: str) -> Stage:
    command, key = measure.PROGRAMS[name]
    return Stage(
        name, label, partial(command, configuration=configuration), key=partial(key, configuration=configuration),
        configuration=configuration, may_fail=run.several,
    )  # fmt: skip


# -- model and text


def _download(run: Run) -> Command:
    request = {"home": str(run.home.root), "config": run.job.config_yaml, "out": str(run.run_dir / "inputs")}
    return replace(run.program("download", PREPARE, request), hub_token=True)


def _download_key(run: Run) -> str:
    local = calibration_source(run.config, run.home).path
    files = sorted(p for p in (local.rglob("*") if local.is_dir() else [local]) if p.is_file()) if local else []
    used = versions("torch", "transformers", "tokenizers", "datasets")
    return digest([run.job.config_yaml, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files], used])


def _input_digests(run: Run) -> dict[str, Any]:
    inputs = run.stage_result("download")
    return {
        "model": model_fingerprint(Path(inputs["model_dir"])),
        "tokens": file_digest(Path(inputs["tokens_file"])),
        "text": file_digest(Path(inputs["text_file"])) if inputs["text_file"] else None,
    }


def _note_inputs(run: Run) -> None:
    write_json(run.result_file("inputs"), _input_digests(run))


def _inputs_are_intact(run: Run) -> bool:
    return run.stage_result("inputs") == _input_digests(run)


# -- quantized models


def _quantize(run: Run) -> Command:
    engine, key = engine_for(run.config), _quantize_key(run)
    for configuration in run.configurations:
        target = run.target(configuration)
        if target.exists() and not _is_published(run, configuration):
            raise JobError(
                f"{target} holds a model that was made from other inputs or was changed since; nothing was "
                "overwritten. Start the job anew under another name (Clone)"
            )
    _prepare_folders(run, engine, key)
    inputs = run.stage_result("download")
    request = {
        "model_dir": inputs["model_dir"],
        "tokens_file": inputs["tokens_file"],
        "out_dir": str(run.staging),
        "device": torch_device(run.job.device),
        "checkpoint_dir": str(run.checkpoint_dir),
        "seed": run.config.CALIBRATION.SEED,
        "configurations": [c.request for c in run.configurations],
    }
    command = run.program("quantize", engine.module, request)
    if engine.environment is None:
        return command
    return Command((str(engine.python()), *command.argv[1:]), engine.environment)


def _prepare_folders(run: Run, engine: Engine, key: str) -> None:
    """Keep an engine's checkpoint if it belongs to exactly this work, else start from empty folders."""
    note = run.run_dir / "checkpoint.json"
    started = note.exists()
    same = started and json.loads(note.read_text(encoding="utf-8")) == {"key": key}
    kept = run.checkpoint_dir.is_dir() and any(run.checkpoint_dir.iterdir())
    if same and kept and all((run.staging / c.name).is_dir() for c in run.configurations):
        log.info("quantize: goes on after what engine %s has finished", engine.name)
        return
    if started and not same:
        log.info("quantize: starts from the beginning, since the model, the text or a package has changed")
    elif started:
        log.info("quantize: starts from the beginning, since engine %s has kept nothing", engine.name)
    for folder in (run.staging, run.checkpoint_dir):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    write_json(note, {"key": key})


def _quantize_key(run: Run) -> str:
    return digest(
        {
            "engine": run.configurations[0].engine,
            "configurations": [c.request for c in run.configurations],
            "seed": run.config.CALIBRATION.SEED,
            "device": run.job.device,
            "inputs": {k: v for k, v in run.stage_result("inputs").items() if k != "text"},
            "versions": versions("torch", "transformers", "llmcompressor"),
        }
    )


def _is_published(run: Run, configuration: Configuration) -> bool:
    """Whether the configuration's model is in its place, made by this very work and unchanged since.

    To measure a model again it is enough that the job made it, with whatever versions of packages.
    """
    target = run.target(configuration)
    manifest = read_manifest(target) or {}
    if manifest.get("job") != run.job.uid:
        return False
    if not run.keeps_models and manifest.get("content_key") != _quantize_key(run):
        return False
    return check_manifest(target) == []


def _models_are_there(run: Run) -> bool:
    return all((run.staging / c.name).is_dir() or _is_published(run, c) for c in run.configurations)


def _models_to_write(run: Run) -> tuple[Path, int]:
    """The staging folder, and a bound: no quantized model is larger than the 16-bit one."""
    written = sum(path.stat().st_size for path in run.staging.rglob("*") if path.is_file())
    whole = len(run.configurations) * weight_bytes(run.stage_result("download")["model_dir"])
    return run.staging, max(0, whole - written)


def _note_quantize(run: Run) -> None:
    # The program times its own stages, which the runner can only see as one process.
    run.timings.pop("quantize", None)
    run.timings.update(run.stage_result("quantize")["timings"])


def _publish(run: Run, configuration: Configuration) -> None:
    inputs, quantized = run.stage_result("download"), run.stage_result("quantize")
    made = next(one for one in quantized["results"] if one["name"] == configuration.name)
    staging, target = run.staging / configuration.name, run.target(configuration)
    facts = {
        "job": run.job.uid,
        "job_id": run.job.job_id,
        "model": run.job.model,
        "model_commit": inputs["model_commit"],
        "algorithm": run.job.algorithm,
        "configuration": {"name": configuration.name, "label": configuration.label, "engine": configuration.engine},
        "calibration": {"sequences": inputs["samples"], "tokens": quantized["tokens"]},
        "device": describe_device(run.job.device),
        "versions": _versions(),
        "notes": made.get("notes", []),
        "content_key": _quantize_key(run),
    }
    if _is_published(run, configuration):
        log.info("%s was already saved in %s", configuration.name, target)
        shutil.rmtree(staging, ignore_errors=True)
        manifest = read_manifest(target)
    else:
        (staging / CONFIG_FILE).write_text(run.job.config_yaml, encoding="utf-8")
        manifest = publish(staging, target, facts)
    entry = {
        "name": configuration.name, "label": configuration.label, "artefact": str(target),
        "bytes": weight_bytes(target), "manifest": manifest, "layers": made["layers"], "skipped": made["skipped"],
        "notes": made.get("notes", []), "rows": [], "table": "",
        "reason": None,
    }  # fmt: skip
    run.result.setdefault("results", []).append(entry)
    if configuration == run.configurations[0]:
        run.result.update(
            {key: entry[key] for key in ("artefact", "manifest", "layers", "skipped", "notes")},
            model_dir=inputs["model_dir"], device=facts["device"], versions=facts["versions"],
            samples=inputs["samples"], samples_wanted=inputs["samples_wanted"],
        )  # fmt: skip


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **versions(*PACKAGES)}


# -- report


def _report(run: Run) -> None:
    """Rows and table of every configuration, from what was measured of it; the first one's are the job's own."""
    baseline_bytes = weight_bytes(run.result["model_dir"])
    nothing: dict[str, Any] = {"metrics": []}
    for configuration in run.configurations:
        entry = run.entry(configuration)
        evaluation = measure.result_of(run, "evaluate_quantized", configuration)
        rows = build_rows(
            run.stage_result("evaluate_baseline") if evaluation else nothing,
            evaluation or nothing,
            baseline_bytes=baseline_bytes,
            quantized_bytes=entry["bytes"],
            bits=_stored_bits(run.result["model_dir"], entry["artefact"]),
            fidelity=measure.result_of(run, "evaluate_fidelity", configuration),
            speed=measure.result_of(run, "benchmark", configuration),
        )
        entry.update(
            rows=rows, table=format_table(rows, run.job.model), reason=run.failures.get(configuration.name)
        )  # fmt: skip
    first = run.entry(run.configurations[0])
    run.result.update(rows=first["rows"], table=first["table"], timings=run.timings, peak_rss_bytes=run.peak_rss_bytes)
    write_json(run.run_dir / "report.json", run.result)


def _stored_bits(*folders: str) -> tuple[StoredBits, StoredBits] | None:
    """The bits that baseline and quantized model take; None, with a note in the log, where they cannot be counted."""
    try:
        before, after = map(measured_bits, folders)
    except CheckpointError as error:
        log.warning("bits per weight are not told: %s", error.message)
        return None
    return before, after
