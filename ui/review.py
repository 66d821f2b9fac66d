"""What a form says about the job it describes: its YAML, what is wrong with it, and what it will make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from backend.engines.aqlm_plan import TUNED
from backend.errors import ConfigError, ConfigErrors, ModelError, QuantdeckError
from backend.jobs.devices import describe_device
from backend.jobs.estimate import Estimate, estimate
from backend.jobs.memory_estimate import MemoryNeed
from backend.jobs.memory_warnings import told_range
from backend.jobs.preflight import Checked, check_job
from backend.jobs.room import Room
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import JobConfig
from backend.sources.known_model import KnownModel
from backend.sources.models import ModelFacts, model_facts, resolve_model
from ui.draft import FIELDS, Draft, FormField, merge
from ui.format import count, duration, size
from ui.layout import REMOTE_CODE, card, esc, facts, notice

FROM_ONE_PASS = "from one pass over the calibration text"
NO_TIME = "Time is told once a job with these settings of the algorithm has finished on this device."
TUNED_FROM_FIRST = "the second one tuned from the first"

Problem = tuple[FormField | None, str, str]  # the control it belongs to, its key in the file, what is wrong


@dataclass(frozen=True)
class Review:
    """A form, checked.

    Attributes:
        text: The YAML as it will be saved.
        config: The settings, None if they are not valid.
        problems: Everything that keeps the job from starting.
        warnings: What is odd but allowed.
        checked: What the checks against model, text and machine found; None if there are problems.
        expected: What an earlier job lets one expect; None if there is none to go by.
    """

    text: str
    config: JobConfig | None
    problems: tuple[Problem, ...]
    warnings: tuple[str, ...]
    checked: Checked | None
    expected: Estimate | None = None

    @property
    def file_name(self) -> str:
        """Name under which the job file is offered."""
        return f"{self.config.JOB_ID}.yaml" if self.config else "job.yaml"


def review(home: Home, draft: Draft, values: Sequence[Any]) -> Review:
    """Check the form's present values; nothing is stored."""
    document = merge(draft, values)
    text = document.dump()
    config = checked = None
    problems: list[Problem] = []
    try:
        config = document.config
        checked = check_job(config, home, confined=True)
    except ConfigErrors as error:
        problems = [_problem(item) for item in error.errors]
    if config is not None and (free := JobStore(home).free_name(config)) != config.JOB_ID:
        message = f"found {config.JOB_ID!r}, which another job has; {free!r} is free"
        problems.append(_problem(ConfigError(message, key="JOB_ID")))
    if problems or config is None or checked is None:
        return Review(text, config, tuple(problems), tuple(document.warnings), None)
    facts = checked.known.facts
    expected = estimate(home, config, facts.weight_bytes, checked.device) if facts else None
    return Review(text, config, (), tuple(document.warnings), checked, expected)


def _problem(error: ConfigError) -> Problem:
    return field_of(error.key), error.key, error.detail


def field_of(key: str) -> FormField | None:
    """The control that an error's key belongs to: the key itself, or the list it is an item of."""
    return next((f for f in FIELDS if key == f.key or key.startswith(f.key + ".")), None)


def review_html(found: Review) -> str:
    """The review's text: problems or the forecast, then warnings."""
    parts = []
    if found.problems:
        items = "".join(f"<li>{_named(problem)}</li>" for problem in found.problems)
        many = "1 setting needs" if len(found.problems) == 1 else f"{len(found.problems)} settings need"
        parts.append(
            f'<div class="qd-notice qd-error" role="alert"><strong>{many} a change before this can start</strong>'
            f"<ul>{items}</ul></div>"
        )
    elif found.checked is not None and found.config is not None:
        parts.append(card(_forecast(found.config, found.checked, found.expected), "What this job will do"))
    warnings = [*(found.checked.warnings if found.checked else ()), *found.warnings]
    if warnings:
        items = "".join(f"<li>{esc(warning)}</li>" for warning in warnings)
        parts.append(f'<div class="qd-notice qd-warn"><strong>Worth knowing</strong><ul>{items}</ul></div>')
    return '<div style="display:grid;gap:14px">' + "".join(parts) + "</div>"


def _named(problem: Problem) -> str:
    field, key, message = problem
    name = (
        f"{esc(field.spec.label)} (<code>{esc(key)}</code>)"
        if field
        else f"<code>{esc(key)}</code>"
        if key
        else "The file"
    )
    return f"<b>{name}</b>: {esc(message)}"


def _forecast(config: JobConfig, checked: Checked, expected: Estimate | None) -> str:
    known = checked.known
    baseline = known.facts.weight_bytes if known.facts else None
    measures = ["quality"] if config.EVALUATION.ENABLED else []
    if config.BENCHMARK.ENABLED:
        own = config.ALGORITHM == "TensorRTLLM"
        measures += ["speed and memory in TensorRT-LLM, if it can run here"] if own else ["speed", "memory"]
    sizes = [
        (one.label, _size_text(checked.predicted.get(one.name), baseline), _bits_text(checked.bits.get(one.name)))
        for one in checked.configurations
    ]
    folder = f"{config.USER_FOLDER}/jobs/{config.JOB_SERVICE}/{config.JOB_ID}"
    own = [one.folder for one in checked.configurations if one.folder]
    if len(sizes) == 1:
        results = [("Weights", sizes[0][0]), ("Bits per weight", sizes[0][2]), ("Size on disk", sizes[0][1])]
    else:
        tuned = checked.configurations[-1].name == TUNED
        results = [("Results", f"{len(sizes)}, {TUNED_FROM_FIRST if tuned else FROM_ONE_PASS}")]
        results += [(label, f"{size}; {bits} bits per weight" if bits else size) for label, size, bits in sizes]
    results = [row for row in results if row[1]]
    rows = [
        ("Device", describe_device(checked.device)),
        *results,
        ("Download", _download_text(known)),
        ("Disk space", _room_text(checked.room)),
        ("Calibration", f"{config.calibration.SAMPLES} x {config.calibration.SEQUENCE_LENGTH} tokens"),
        ("Time", _expected_text(expected)),
        ("Memory", _memory_text(checked.memory, expected)),
        ("Measured after", ", ".join(["size", *measures])),
        ("Saved in", " and ".join([folder] if not own else [f"{folder}/{own[0]}", *own[1:]])),
    ]
    told = list(checked.notes)
    told += [f"Size and bits are known {known.basis}."] if known.basis and known.facts else []
    told += [NO_TIME] if expected is None else []
    told += [f"Memory to {need.what}, {told_range(need)}: {need.basis}." for need in checked.memory]
    notes = "".join(f'<p class="qd-muted qd-small" style="margin:10px 0 0">{esc(note)}</p>' for note in told)
    return (
        (notice("error", *REMOTE_CODE) if config.TRUST_REMOTE_CODE else "")
        + facts([row for row in rows if row[1]])
        + notes
    )


def _expected_text(expected: Estimate | None) -> str:
    """What an earlier job lets one expect, with the job as the basis."""
    if expected is None:
        return "no basis yet"
    memory = f", peak memory {size(expected.peak_bytes)}" if expected.peak_bytes else ""
    return f"about {duration(expected.seconds)} to quantize{memory}, going by job {expected.basis}"


def _download_text(known: KnownModel) -> str:
    """What has to be fetched of a model on the Hub; nothing for one that is here."""
    if not known.basis or not known.download_bytes:
        return ""
    return f"{size(known.download_bytes)}, kept in the cache for later jobs"


def _room_text(room: Room | None) -> str:
    """What a job takes of the disk while it runs."""
    if room is None:
        return ""
    return f"{size(room.download + room.results)} at most while it runs"


def _memory_text(needs: Sequence[MemoryNeed], expected: Estimate | None) -> str:
    """What the largest part of the job will take; what an earlier job took stands beside its time."""
    measured = expected is not None and expected.peak_bytes is not None
    if measured or not needs:
        return ""
    most = max(needs, key=lambda need: need.high)
    return told_range(most) + ("" if most.where == "memory" else " of the GPU")


def _bits_text(bits: float | None) -> str:
    """Predicted bits per weight, everything counted; nothing where they are not known before."""
    return f"{bits:.2f}" if bits is not None else ""


def _size_text(predicted: int | None, baseline: int | None) -> str:
    """A result's predicted size beside the model's."""
    if baseline is None:
        return "known after the download"
    if predicted is None:
        return f"known when it is saved; the model has {size(baseline)}"
    return f"{size(predicted)}, {100 * predicted / baseline:.0f} % of {size(baseline)}"


def command_html(found: Review) -> str:
    """The command line that runs the same job in a terminal."""
    name = found.file_name
    return (
        '<p class="qd-muted qd-small" style="margin:0 0 4px">'
        f"The same job from a terminal, with this YAML saved as {esc(name)}:</p>"
        f'<pre class="qd-log">python -m backend run {esc(name)}</pre>'
    )


def model_html(home: Home, model: str, custom_path: str) -> str:
    """What the chosen model is, or why that cannot be told."""
    if not (model or custom_path or "").strip():
        return notice("info", "Choose a model", "The built-in demo model needs no download and no GPU.")
    probe = JobConfig.model_construct(
        MODEL=(model or "").strip(), CUSTOM_MODEL_PATH=(custom_path or "").strip() or None
    )
    try:
        source = resolve_model(probe, home, confined=True)
        if source.path is None:
            return notice(
                "info", f"{source.id} comes from the Hugging Face Hub", "It is downloaded when the job starts."
            )
        found = _facts(str(source.path))
    except ConfigErrors as error:
        return notice("error", "This model cannot be used", error.errors[0].detail)
    except QuantdeckError as error:
        return notice("error", "This model cannot be used", error.message)
    return facts(
        [
            ("Architecture", found.architecture),
            ("Layers", str(found.layers)),
            ("Hidden size", f"{found.hidden_size:,}"),
            ("Vocabulary", f"{found.vocab_size:,}"),
            ("Parameters", count(found.parameters)),
            ("Weights", f"{size(found.weight_bytes)}, {found.dtype}"),
        ]
    )


@lru_cache(maxsize=32)
def _cached_facts(folder: str, stamp: int) -> ModelFacts:
    return model_facts(Path(folder))


def _facts(folder: str) -> ModelFacts:
    if not Path(folder).is_dir():
        raise ModelError(f"There is no folder {folder}.")
    # Reading every header takes a moment for large models; the folder's time of change keeps the cache honest.
    return _cached_facts(folder, Path(folder).stat().st_mtime_ns)
