"""Everything about a job that can be known before it starts, checked without importing torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backend.engines.autoawq_checks import autoawq_problems
from backend.engines.configurations import Configuration, by_the_core, configurations
from backend.engines.llm_problems import llm_problems
from backend.engines.registry import engine_for
from backend.errors import ConfigError, ConfigErrors, QuantdeckError
from backend.evaluate.tasks import check_tasks
from backend.formats.bits import predicted_bits
from backend.formats.size import predicted_additive_size, predicted_size
from backend.jobs.aqlm_checks import check_aqlm
from backend.jobs.devices import choose_device
from backend.jobs.fit_checks import check_windows, packing_notes
from backend.jobs.machine_memory import free_memory
from backend.jobs.memory_estimate import MemoryNeed, memory_needs
from backend.jobs.memory_warnings import memory_warnings
from backend.jobs.room import Room, check_room, room_of
from backend.jobs.text_checks import check_calibration, check_tuning
from backend.jobs.trtllm_checks import check_device, run_notes
from backend.jobs.trust import check_remote_code
from backend.paths import Home
from backend.quantize.recipe import Recipe
from backend.schema import JobConfig
from backend.settings import Settings
from backend.sources.known_model import KnownModel, known_model
from backend.sources.models import ModelSource, resolve_model
from backend.sources.places import check_outputs
from backend.sources.plan import calibration_source, evaluation_source, evaluation_tasks
from backend.sources.quick_check import QuickFacts, kept_linears, kept_note
from backend.sources.texts import check_rows
from backend.tensorrt_llm.fit import check_fit, predicted_exports


@dataclass(frozen=True)
class Checked:
    """What the checks found out.

    Attributes:
        device: Where the job will run, `cpu` or `cuda:N`.
        model: The model; its `path` is None if it comes from the Hub.
        known: What is known of the model before it starts.
        configurations: The results that the job will make.
        predicted: Name of a configuration -> size of its weight files; without those that are not known before.
        bits: Name of a configuration -> bits per quantized weight, scales and codebooks included; as `predicted`.
        notes: Facts worth telling before the start.
        room: Disk space that it needs; None if that is not known.
        memory: What its largest parts need; empty if that is not known.
        warnings: What may make it fail, and what to do about it.
    """

    device: str
    model: ModelSource
    known: KnownModel
    configurations: tuple[Configuration, ...]
    predicted: dict[str, int]
    bits: dict[str, float]
    notes: tuple[str, ...]
    room: Room | None = None
    memory: tuple[MemoryNeed, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def predicted_bytes(self) -> int | None:
        """The first configuration's predicted size, None if it is not known."""
        return self.predicted.get(self.configurations[0].name)


def check_job(config: JobConfig, home: Home, *, confined: bool = False) -> Checked:
    """Check a job against the model, the text and the machine that are really there.

    Raises:
        ConfigErrors: With every problem found, each at its key.
    """
    problems: list[ConfigError] = []
    notes: list[str] = []

    def attempt(key: str, check: Callable[[], Any]) -> Any:
        try:
            return check()
        except ConfigErrors as error:
            problems.extend(error.errors)
        except ConfigError as error:
            problems.append(error)
        except QuantdeckError as error:
            named, _, rest = error.message.partition(": ")
            here = named if named.isupper() else key
            problems.append(ConfigError(rest if named.isupper() else error.message, key=here))
        return None

    settings = attempt("", lambda: Settings.load(home)) or Settings()
    attempt("USER_FOLDER", lambda: check_outputs(config, home))
    device = attempt("CUDA_ID", lambda: choose_device(config.CUDA_ID))
    if device == "cpu":
        notes.append("No GPU was found: this job runs on the CPU.")
    has_engines = "ENGINE" in type(config.algorithm_settings).model_fields
    engine_key = f"llm.{config.ALGORITHM}.ENGINE" if has_engines else "ALGORITHM"
    attempt(engine_key, lambda: engine_for(config))
    planned = tuple(configurations(config, device or "cpu"))
    attempt("", lambda: check_device(config, device or "cpu"))
    notes += packing_notes(config, device or "cpu")
    attempt("TRUST_REMOTE_CODE", lambda: check_remote_code(config, settings))
    if any(_is_awq_below_4_bits(one) for one in planned):
        notes.append("AWQ alone hardly beats plain rounding below 4 bits; GPTQ or AWQ+GPTQ are better there.")
    model = attempt("MODEL", lambda: resolve_model(config, home, confined=confined))
    model_key = "CUSTOM_MODEL_PATH" if config.CUSTOM_MODEL_PATH else "MODEL"
    predicted: dict[str, int] = {}
    bits: dict[str, float] = {}
    known = room = None
    memory: tuple[MemoryNeed, ...] = ()
    if model is not None:
        pickles = settings.models.allow_pickle
        known = attempt(model_key, lambda: known_model(model, config, home, allow_pickle=pickles))
    if known is not None and known.note:
        notes.append(known.note)
    if known is not None and (facts := known.facts) is not None:
        attempt(model_key, lambda: MODEL_CHECKS[config.ALGORITHM](facts, config, planned, notes))
        attempt("EVALUATION.WINDOW", lambda: check_windows(facts, config))
        if config.ALGORITHM == "TensorRTLLM":
            folder = known.folder or Path(model.id)
            notes += attempt("", lambda: run_notes(config, facts, home, folder, device or "cpu")) or []
        predicted, bits = _predicted(facts, config, device or "cpu")
        room = room_of(planned, predicted, facts.weight_bytes, known.download_bytes)
        attempt("USER_FOLDER", lambda: check_room(home, config, room, len(planned)))
        memory = memory_needs(facts, config, planned, device or "cpu")
    folder = known.folder if known else None
    text = attempt("DATA_PATH", lambda: calibration_source(config, home, confined=confined))
    if text is not None and text.is_local:
        key = "DATA_PATH" if text.path else "DATASET_NAME"
        samples = attempt(key, lambda: check_calibration(text, config, folder))
        if samples is not None and samples < config.calibration.SAMPLES:
            attempt("", lambda: config.check_sequences(samples))
            notes.append(
                f"The calibration text makes {samples} sequences of {config.calibration.SEQUENCE_LENGTH} tokens; "
                f"{config.calibration.SAMPLES} were asked for."
            )
    attempt("", lambda: check_tuning(config, home, folder, confined, notes))
    if config.EVALUATION.ENABLED:
        attempt("EVALUATION.TASKS", lambda: check_tasks([t.NAME for t in evaluation_tasks(config)]))
        evaluation = attempt("EVALUATION.DATASET_NAME", lambda: evaluation_source(config))
        if evaluation is not None and config.EVALUATION.needs_text and evaluation.is_local:
            attempt("EVALUATION.DATASET_NAME", lambda: check_rows(evaluation))
    if problems:
        raise ConfigErrors(problems)
    assert known is not None  # else its problem is among them
    warnings = memory_warnings(memory, *free_memory(device))
    return Checked(device, model, known, planned, predicted, bits, tuple(notes), room, memory, warnings)


def _is_awq_below_4_bits(one: Configuration) -> bool:
    if one.recipe is not None:
        return one.recipe.scheme.method == "AWQ" and one.recipe.scheme.bits < 4
    settings = one.request.get("settings", {})
    return settings.get("RECIPE") == "AWQ" and settings.get("SCHEME") in ("W3A16", "W2A16")


def _at_section(config: JobConfig, error: ConfigError) -> ConfigError:
    """A problem of the algorithm's section, at its full key."""
    return ConfigError(error.detail, key=f"llm.{config.ALGORITHM}.{error.key}", value=error.value)


def _check_recipes(facts: QuickFacts, config: JobConfig, planned: Sequence[Configuration], notes: list[str]) -> None:
    """Refuse recipes of the core that quantize nothing; note which Linears each leaves in 16 bits."""
    problems: dict[tuple[str, str], ConfigError] = {}
    said: dict[str, list[str]] = {}
    for planned_one in planned:
        recipe = planned_one.recipe
        if recipe is None:
            continue
        try:
            kept = kept_linears(facts.linears, recipe, planned_one.request["layout"])
        except ConfigError as error:
            problems.setdefault((error.key, error.detail), error)
            continue
        if kept:
            said.setdefault(kept_note(kept, len(facts.linears)), []).append(planned_one.label)
    for note, labels in said.items():
        notes.append(note if len(labels) == len(planned) else f"{' and '.join(labels)}: {note}")
    if problems:
        raise ConfigErrors([_at_section(config, _renamed(config, error)) for error in problems.values()])


def _renamed(config: JobConfig, error: ConfigError) -> ConfigError:
    """The same problem at the key that llm-compressor's section has for it."""
    if config.ALGORITHM != "LLMCompressor":
        return error
    key = "GROUP_SIZE" if error.key == "Q_GROUP_SIZE" else "IGNORE"
    return ConfigError(error.detail, key=key, value=error.value)


def _check_packages(facts: QuickFacts, config: JobConfig, planned: Sequence[Configuration]) -> None:
    """What the packages of other people cannot do with this model; they would find out hours later, or never."""
    problems: list[ConfigError] = []
    for one in planned:
        if one.engine == "autoawq":
            found = autoawq_problems(facts.headers, one.request["settings"], facts.config)
            problems += [_at_section(config, problem) for problem in found]
        elif one.engine == "llmcompressor":
            problems += llm_problems(facts.headers, one.request["settings"], facts.config)
    if problems:
        raise ConfigErrors(problems)


def _check_core_or_package(
    facts: QuickFacts, config: JobConfig, planned: Sequence[Configuration], notes: list[str]
) -> None:
    problems: list[ConfigError] = []
    for check in (
        lambda: _check_recipes(facts, config, planned, notes),
        lambda: _check_packages(facts, config, planned),
    ):
        try:
            check()
        except ConfigErrors as error:
            problems += error.errors
    if problems:
        raise ConfigErrors(problems)


MODEL_CHECKS: dict[str, Callable[[QuickFacts, JobConfig, Sequence[Configuration], list[str]], None]] = {
    "AutoAWQ": _check_core_or_package,
    "Native": _check_core_or_package,
    "LLMCompressor": _check_core_or_package,
    "AQLM": check_aqlm,
    "TensorRTLLM": lambda facts, config, planned, notes: check_fit(facts, config),
}
"""What an algorithm asks of the model."""


def _predicted(facts: QuickFacts, config: JobConfig, device: str) -> tuple[dict[str, int], dict[str, float]]:
    """Bytes of the weight files (of the packages' own results but for a file header), bits per quantized weight."""
    sizes, bits = {}, {}
    if config.ALGORITHM == "TensorRTLLM":
        return predicted_exports(facts, configurations(config, device))
    for one in by_the_core(config, device):
        with suppress(ConfigError):  # nothing would be quantized: told by the checks
            sizes[one.name] = _size_of(facts, one)
            bits[one.name] = predicted_bits(facts.linears, one.additive or _recipe_of(one), one.request["layout"])
    return sizes, bits


def _size_of(facts: QuickFacts, one: Configuration) -> int:
    dtype = one.request["dtype"]
    if (scheme := one.additive) is not None:
        return predicted_additive_size(facts.headers, facts.config, scheme, dtype=dtype)
    return predicted_size(facts.headers, facts.config, _recipe_of(one), layout=one.request["layout"], dtype=dtype)


def _recipe_of(one: Configuration) -> Recipe:
    assert one.recipe is not None  # of the core
    return one.recipe
