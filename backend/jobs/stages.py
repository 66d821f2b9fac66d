"""The stages of a job, in order, and what each needs from the ones before.

A stage either starts a program (its request and result are JSON files in the run folder) or is done by the
runner itself. The models are published before anything is measured, so nothing that fails later can lose them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from backend.engines.configurations import Configuration
from backend.errors import CheckpointError
from backend.evaluate.cache import digest, file_digest, model_fingerprint
from backend.evaluate.metrics import versions
from backend.evaluate.report import build_rows, format_table
from backend.files import write_json
from backend.formats.bits import StoredBits, measured_bits
from backend.formats.size import weight_bytes
from backend.jobs import aqlm_stages, measure, one_program, trtllm_metrics, trtllm_stages
from backend.jobs.program import Command
from backend.jobs.run import Run
from backend.jobs.stage import Stage
from backend.sources import hub_token
from backend.sources.plan import calibration_source, tuning_source

PREPARE = "backend.sources.prepare"

log = logging.getLogger("quantdeck.runner")

MAKERS: dict[str, Callable[[Run], list[Stage]]] = {
    "AutoAWQ": one_program.stages,
    "Native": one_program.stages,
    "LLMCompressor": one_program.stages,
    "AQLM": aqlm_stages.stages,
    "TensorRTLLM": trtllm_stages.stages,
}
"""The stages in which an algorithm's models are made and saved."""

RUNNERS: dict[str, Callable[[Run], list[Stage]]] = {"TensorRTLLM": trtllm_stages.run_stages}
"""The stages in which models are run that need a program of their own for that."""


def stages_of(run: Run) -> list[Stage]:
    """The stages that this job needs."""
    each = run.configurations
    stages = [
        Stage("download", "Load model and text", _download, _note_inputs, _download_key, _inputs_are_intact),
        *MAKERS[run.config.ALGORITHM](run),
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
    if run.config.BENCHMARK.ENABLED and run.config.ALGORITHM in RUNNERS:
        stages += RUNNERS[run.config.ALGORITHM](run)
    elif run.config.BENCHMARK.ENABLED:
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
    request = {
        "home": str(run.home.root),
        "config": run.job.config_yaml,
        "out": str(run.run_dir / "inputs"),
        "device": run.job.device,
    }
    command = run.program("download", PREPARE, request)
    return replace(command, hub_token=True, token_file=hub_token.token_file(run.home))


def _download_key(run: Run) -> str:
    sources = (calibration_source(run.config, run.home), tuning_source(run.config, run.home))
    places = {source.path for source in sources if source is not None and source.path is not None}
    files = sorted(p for place in places for p in (place.rglob("*") if place.is_dir() else [place]) if p.is_file())
    used = versions("torch", "transformers", "tokenizers", "datasets")
    return digest([run.job.config_yaml, [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files], used])


def _input_digests(run: Run) -> dict[str, Any]:
    inputs = run.stage_result("download")
    return {
        "model": model_fingerprint(Path(inputs["model_dir"])),
        "tokens": file_digest(Path(inputs["tokens_file"])),
        "text": file_digest(Path(inputs["text_file"])) if inputs["text_file"] else None,
        **({"tuning": file_digest(Path(inputs["tuning_file"]))} if "tuning_file" in inputs else {}),
    }


def _note_inputs(run: Run) -> None:
    write_json(run.result_file("inputs"), _input_digests(run))


def _inputs_are_intact(run: Run) -> bool:
    return run.stage_result("inputs") == _input_digests(run)


# -- report


def _report(run: Run) -> None:
    """Rows and table of every configuration, from what was measured of it; the first one's are the job's own."""
    if not run.result.get("results"):
        return  # nothing could be made
    baseline_bytes = weight_bytes(run.result["model_dir"])
    nothing: dict[str, Any] = {"metrics": []}
    for configuration in run.configurations:
        entry = run.entry(configuration)
        if entry is None:
            continue  # it could not be made; why, the job tells
        evaluation = measure.result_of(run, "evaluate_quantized", configuration)
        fidelity = measure.result_of(run, "evaluate_fidelity", configuration)
        speed = measure.result_of(run, "benchmark", configuration)
        if run.config.ALGORITHM in RUNNERS:
            entry["ran"] = trtllm_stages.told_of_run(run, configuration)
            speed = trtllm_metrics.of_both_models(entry["ran"], run.stage_result("download")["text_name"])
        rows = build_rows(
            run.stage_result("evaluate_baseline") if evaluation else nothing,
            evaluation or nothing,
            baseline_bytes=baseline_bytes,
            quantized_bytes=entry["bytes"],
            bits=_stored_bits(run.result["model_dir"], entry["artefact"]),
            fidelity=fidelity,
            speed=speed,
        )
        ran_by = (speed or fidelity or {}).get("quantized", evaluation or nothing).get("decode_path")
        entry.update(
            rows=rows, table=format_table(rows, run.job.model), decode_path=ran_by,
            reason=run.failures.get(configuration.name),
        )  # fmt: skip
    first = run.result["results"][0]
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
