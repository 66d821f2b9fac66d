"""Whether windows of the evaluation fit into the model, and the packing of the weights to this machine's GPUs."""

from __future__ import annotations

from backend.errors import ConfigError, ConfigErrors
from backend.jobs.devices import gpu_numbers, gpus
from backend.schema import JobConfig
from backend.sources.quick_check import QuickFacts

GUIDE_WINDOW = 512  # tokens, of the protocol gptq_wikitext
TURING = (7, 5)
"""The lowest compute capability for which AutoAWQ and vLLM have kernels of these layouts."""


def check_windows(facts: QuickFacts, config: JobConfig) -> None:
    """Refuse windows with more tokens than the model has positions: the job would find out after quantizing.

    Raises:
        ConfigErrors: With every window that is too long, at its key.
    """
    most, wanted = facts.config.get("max_position_embeddings"), config.EVALUATION
    if not isinstance(most, int) or not wanted.ENABLED:
        return
    problems = []
    # The last token of a window is only predicted, so it takes no position.
    if "gptq_wikitext" in wanted.PROTOCOLS and most < GUIDE_WINDOW - 1:
        message = (
            f"found gptq_wikitext, with windows of {GUIDE_WINDOW} tokens, and the model has {most} positions; "
            "choose full_window alone, with a smaller WINDOW"
        )
        problems.append(ConfigError(message, key="EVALUATION.PROTOCOLS", value=wanted.PROTOCOLS))
    if ("full_window" in wanted.PROTOCOLS or wanted.FIDELITY) and most < wanted.WINDOW - 1:
        message = f"found {wanted.WINDOW}, and the model has {most} positions; allowed are at most {most + 1} tokens"
        problems.append(ConfigError(message, key="EVALUATION.WINDOW", value=wanted.WINDOW))
    if problems:
        raise ConfigErrors(problems)


def packing_notes(config: JobConfig, device: str) -> list[str]:
    """What AutoAWQ's packing of the weights asks of the programs and GPUs that run them; nothing for other layouts.

    Args:
        config: The job.
        device: Where it will run.
    """
    settings = config.algorithm_settings
    layout = getattr(settings, "layout", "")
    if not layout.startswith("autoawq-"):
        return []
    version = layout.removeprefix("autoawq-").upper()
    key = "VERSION" if hasattr(settings, "VERSION") else "FORMAT"
    notes = []
    if version == "GEMV":
        notes.append(f"{key} GEMV: vLLM reads AutoAWQ's files only in the packing GEMM; set it to that for vLLM.")
        if device == "cpu":
            notes.append(
                f"{key} GEMV: AutoAWQ's kernels for this packing need an NVIDIA GPU, and there is none here; Quantdeck "
                "measures and answers with its own reader."
            )
    old = [
        f"GPU {gpu.index} ({gpu.name}) has {gpu.capability[0]}.{gpu.capability[1]}"
        for gpu in gpus()
        if device != "cpu" and gpu.index in gpu_numbers(device) and gpu.capability and gpu.capability < TURING
    ]
    if old:
        notes.append(
            f"{key} {version}: the kernels of AutoAWQ and vLLM for this packing need compute capability 7.5, and "
            f"{', '.join(old)}; Quantdeck measures and answers with its own reader."
        )
    return notes
