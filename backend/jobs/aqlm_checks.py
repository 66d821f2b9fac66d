"""What an AQLM job's settings ask of the model, checked on its config.json and headers. Imports no torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from backend.engines.aqlm_plan import TUNED
from backend.engines.configurations import Configuration
from backend.errors import ConfigError, ConfigErrors
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.schema import AQLMSettings, JobConfig
from backend.sources.quick_check import QuickFacts, kept_note

KEY = "llm.AQLM"
BLOCKS, TUNE = f"{KEY}.calibration_config", f"{KEY}.finetune_config"


def check_aqlm(facts: QuickFacts, config: JobConfig, planned: Sequence[Configuration], notes: list[str]) -> None:
    """Refuse what does not go with the model; note which Linears stay in 16 bits, and what takes long.

    Raises:
        ConfigErrors: With every problem, each at its key.
    """
    settings, scheme = config.algorithm_settings, planned[0].additive
    assert isinstance(settings, AQLMSettings) and scheme is not None
    tunes = planned[-1].name == TUNED
    problems = [*_codebook_problems(facts, scheme, notes), *_length_problems(facts, config, tunes)]
    if tunes and settings.finetune_config.block_type is not None:
        problems += _block_problems(facts, settings.finetune_config.block_type)
    if settings.EFFORT == "reference" and settings.calibration_config.beam_size > scheme.words:
        problems.append(_beam_problem(f"{BLOCKS}.beam_size", settings.calibration_config.beam_size, scheme))
    if tunes and settings.finetune_config.beam_size > scheme.words:
        problems.append(_beam_problem(f"{TUNE}.beam_size", settings.finetune_config.beam_size, scheme))
    if problems:
        raise ConfigErrors(problems)
    if settings.EFFORT == "reference":
        notes.append("EFFORT reference is the published procedure: many times slower than default, at a larger error.")


def _codebook_problems(facts: QuickFacts, scheme: AdditiveScheme, notes: list[str]) -> list[ConfigError]:
    """Linears that the codebooks do not fit are told; that they fit none is a problem."""
    kept = {name: reason for name, shape in facts.linears.items() if (reason := scheme.misfit(*shape))}
    if len(kept) < len(facts.linears):
        if kept:
            notes.append(kept_note(kept, len(facts.linears)))
        return []
    widths = sorted({width for _, width in facts.linears.values()})
    if all(width % scheme.in_group_size for width in widths):
        fitting = [size for size in range(16, 1, -1) if all(width % size == 0 for width in widths)]
        told = f"use {' or '.join(map(str, fitting[:3]))}" if fitting else "no group size of 2 to 16 does"
        return [
            ConfigError(
                f"found {scheme.in_group_size}, which divides the inputs of no Linear "
                f"({', '.join(map(str, widths))}), so nothing would be quantized; {told}",
                key=f"{BLOCKS}.in_group_size",
                value=scheme.in_group_size,
            )
        ]
    reason = Counter(kept.values()).most_common(1)[0][0]
    most = max(out * width // scheme.in_group_size for out, width in facts.linears.values())
    return [
        ConfigError(
            f"found {scheme.nbits_per_codebook}: nothing would be quantized, since e.g. of {next(iter(kept))} "
            f"{reason}; use at most {most.bit_length() - 1}, for 2 bits per weight e.g. num_codebooks 2 and "
            "nbits_per_codebook 8",
            key=f"{BLOCKS}.nbits_per_codebook",
            value=scheme.nbits_per_codebook,
        )
    ]


def _length_problems(facts: QuickFacts, config: JobConfig, tunes: bool) -> list[ConfigError]:
    """Sequences may not be longer than what the model has positions for."""
    most = facts.config.get("max_position_embeddings")
    if not isinstance(most, int):
        return []
    settings = config.algorithm_settings
    assert isinstance(settings, AQLMSettings)
    given = "SEQUENCE_LENGTH" in config.CALIBRATION.model_fields_set
    lengths = [
        ("CALIBRATION.SEQUENCE_LENGTH" if given else f"{BLOCKS}.model_seqlen", config.calibration.SEQUENCE_LENGTH)
    ]
    if tunes:
        lengths.append((f"{TUNE}.model_seqlen", settings.finetune_config.model_seqlen))
    return [
        ConfigError(
            f"found {length}; the model has {most} positions, so at most that is allowed", key=key, value=length
        )
        for key, length in lengths
        if length > most
    ]


def _block_problems(facts: QuickFacts, wanted: str) -> list[ConfigError]:
    """A class of another family's layers; the exact name is checked when the model is loaded."""
    name = (facts.config.get("architectures") or [""])[0]
    family, found, _ = name.partition("For")
    if not found or wanted.startswith(family):
        return []
    return [
        ConfigError(
            f"found {wanted!r}; the model is a {name}, whose layers are called {family}...; leave it empty, or give "
            f"e.g. {family}DecoderLayer",
            key=f"{TUNE}.block_type",
            value=wanted,
        )
    ]


def _beam_problem(key: str, found: int, scheme: AdditiveScheme) -> ConfigError:
    return ConfigError(
        f"found {found}; a codebook of {scheme.nbits_per_codebook} bits has {scheme.words} codewords; allowed are 1 to "
        f"{scheme.words}",
        key=key,
        value=found,
    )
