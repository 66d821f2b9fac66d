"""What memory a job will need at most, added up from the shapes of its model.

A sum of what the programs hold at the same time in their largest step, checked against measured peaks
(`tests/jobs/test_memory_estimate.py`). Imports no torch. A job that has run tells better: `backend.jobs.estimate`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from backend.engines.configurations import Configuration
from backend.formats.headers import TensorInfo
from backend.formats.size import LAYER, artefact_order
from backend.jobs.machine_memory import has_bfloat16
from backend.jobs.room import amount
from backend.quantize.recipe import Recipe
from backend.schema import AQLMSettings, JobConfig
from backend.sources.quick_check import QuickFacts

PROGRAM_BYTES = 500_000_000  # resident once torch and transformers are imported
CUDA_BYTES = 600_000_000  # what CUDA itself takes of a GPU, about
LOW, HIGH = 0.9, 1.2  # of the sum, for the core: measured peaks lie between
PACKAGES_HIGH = 1.3  # of the sum, for packages of others: it is what they cannot do without
PACKAGES_MORE = 10**9  # beyond that
MICROBATCH_TOKENS = 4096  # that pass a layer together
ACTIVATIONS_LIMIT = 2 * 2**30  # above it they live on disk
FEEDBACK_WEIGHTS = 2**25  # rounded together by GPTQ, every range tried counting
CORRECTION_MATRICES = 7  # of the widest input, while targets are moved
TOGETHER = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"}, {"w1", "w3"}, {"query", "key", "value"})
"""Last parts of the names of Linears that read the same input."""


@dataclass(frozen=True)
class MemoryNeed:
    """What a part of a job needs.

    Attributes:
        what: The part: `quantize` or `measure`.
        where: `memory`, or `memory of the GPU`.
        low: Bytes that it needs at the least.
        high: Bytes that it hardly needs more than.
        basis: What was added up, in words.
        advice: What would need less, most helpful first.
    """

    what: str
    where: str
    low: int
    high: int
    basis: str
    advice: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layer:
    """The decoder layer with most weights; all in bytes or numbers of weights.

    Attributes:
        stored: Bytes in the files.
        weights: All of its weights.
        linears: Weights of its Linears.
        widest: Inputs of the Linear that has most.
        out: Outputs of the Linear that has most.
        grams: Bytes of the Gram matrices of all its inputs.
        shared: Most weights that read the same input.
    """

    stored: int
    weights: int
    linears: int
    widest: int
    out: int
    grams: int
    shared: int


def memory_needs(
    facts: QuickFacts, config: JobConfig, planned: Sequence[Configuration], device: str
) -> tuple[MemoryNeed, ...]:
    """What a job's largest parts will need.

    Args:
        facts: Its model.
        config: The job.
        planned: Its results.
        device: Where it runs.
    """
    engine = planned[0].engine
    if engine != "native":
        making = _package(facts, config, engine, device)
    elif planned[0].additive is not None:
        making = _aqlm(facts, config, device)
    else:
        making = _core(facts, config, [recipe for one in planned if (recipe := one.recipe) is not None], device)
    measuring = _measuring(facts, config, device)
    return (making, measuring) if measuring else (making,)


def _core(facts: QuickFacts, config: JobConfig, recipes: Sequence[Recipe], device: str) -> MemoryNeed:
    layer, compute = _largest_layer(facts), _compute_bytes(device)
    tokens = config.calibration.SAMPLES * config.calibration.SEQUENCE_LENGTH
    hidden = _hidden(facts)
    activations = tokens * hidden * compute
    part = max(1, MICROBATCH_TOKENS // config.calibration.SEQUENCE_LENGTH) * config.calibration.SEQUENCE_LENGTH
    inside = min(part, tokens) * (4 * layer.out + 2 * hidden) * compute  # hidden states of a part in the layer
    widest = 4 * layer.widest**2
    steps = {"calibrating": layer.weights * compute + layer.grams + inside}
    for recipe in recipes:
        steps[recipe.scheme.method] = max(
            steps.get(recipe.scheme.method, 0), _rounding(layer, recipe, compute, widest, len(recipes))
        )
        if recipe.corrects:
            both = 2 * min(part, tokens) * layer.widest * compute
            exact = 2 * layer.weights * compute  # the layer's own weights, and the rounded ones
            steps[f"{recipe.scheme.method} with CORRECT"] = (
                2 * layer.grams - widest + 4 * layer.weights + exact + CORRECTION_MATRICES * widest + both
            )
    name, step = max(steps.items(), key=lambda item: item[1])
    held = activations if activations <= ACTIVATIONS_LIMIT else 0
    outside = _outside(facts)
    advice = _advice(name, held, step)
    if device != "cpu":
        sums = CUDA_BYTES + max(step, _embedding(facts) // 2 * compute)
        return MemoryNeed(
            "quantize", "memory of the GPU", int(LOW * sums), int(1.5 * sums),
            f"one decoder layer at a time: its weights and Gram matrices while {_doing(name)}; added up from the "
            "shapes, and not compared with a GPU yet",
            advice,
        )  # fmt: skip
    if outside > held + step:
        basis = (
            f"the largest tensors outside the decoder layers, {amount(max(_outside_bytes(facts)))}, while they are "
            "read and stored; each decoder layer takes less"
        )
        advice = ()
    else:
        basis = (
            f"one decoder layer at a time: its weights in 32 bits ({amount(4 * layer.weights)}), Gram matrices of "
            f"its inputs ({amount(layer.grams)}) and what is derived from them while {_doing(name)}"
        )
        basis += f", and activations of {tokens:,} tokens ({amount(held)})" if held > 0.1 * step else ""
    sums = PROGRAM_BYTES + max(outside, held + step)
    return MemoryNeed("quantize", "memory", int(LOW * sums), int(HIGH * sums), basis, advice)


def _doing(step: str) -> str:
    return step if step == "calibrating" else f"{step} rounds"


def _rounding(layer: _Layer, recipe: Recipe, compute: int, widest: int, n_recipes: int) -> int:
    """Bytes while a recipe rounds a layer; its Gram matrices are there all the time."""
    full = 4 * layer.weights
    if not recipe.scheme.feeds_back:
        fast = layer.grams // 2  # once made, kept for the recipes that follow
        again = 2 * full + layer.stored + (fast if n_recipes > 1 else 0)  # the layer is read anew for each recipe
        return layer.grams + max(again, full + fast + layer.linears)
    chunk = min(FEEDBACK_WEIGHTS, 2 * layer.shared)
    packed = 4 * (chunk // 2 + 2 * chunk) + 3 * chunk
    return layer.grams + full + max(layer.grams - widest + 3 * widest, layer.grams + packed + layer.linears)


def _advice(step: str, activations: int, rest: int) -> tuple[str, ...]:
    """What takes less, where it would be felt."""
    found = []
    if "CORRECT" in step:
        found.append("CORRECT: false, or METHOD GPTQ, which take about a third less")
    elif step.endswith("GPTQ"):
        found.append("METHOD AWQ, which keeps no factors")
    if activations > rest // 4:
        found.append("fewer SAMPLES or a shorter SEQUENCE_LENGTH")
    return tuple(found)


def _aqlm(facts: QuickFacts, config: JobConfig, device: str) -> MemoryNeed:
    settings = config.algorithm_settings
    assert isinstance(settings, AQLMSettings)
    layer, compute = _largest_layer(facts), _compute_bytes(device)
    tokens = config.calibration.SAMPLES * config.calibration.SEQUENCE_LENGTH
    stored = tokens * _hidden(facts) * compute
    held = 2 * stored if stored <= ACTIVATIONS_LIMIT else 0  # inputs, and what the dense layer answers
    fitting = layer.weights * compute + layer.grams + 4 * layer.linears * 3
    part = max(MICROBATCH_TOKENS, config.calibration.SEQUENCE_LENGTH)
    training = layer.weights * (compute + 3 * 4) + min(part, tokens) * (4 * layer.out + 6 * _hidden(facts)) * 4
    trains = settings.calibration_config.finetune_max_epochs > 0
    step = max(fitting, training) if trains else fitting
    outside = _outside(facts)
    sums = (PROGRAM_BYTES if device == "cpu" else CUDA_BYTES) + max(step + held, outside if device == "cpu" else 0)
    basis = (
        f"one decoder layer at a time: its weights in several copies ({amount(4 * layer.weights)} each in 32 bits), "
        f"Gram matrices ({amount(layer.grams)})"
    )
    basis += ", and what training a layer keeps for its backward pass" if trains else ""
    basis += "; tuning the whole model afterwards needs more: the model in 16 bits at least" if settings.tunes else ""
    advice = ["fewer SAMPLES or a shorter SEQUENCE_LENGTH"] if held > step // 4 else []
    advice += ["local_batch_size 1", "use_checkpointing: true"] if trains else []
    low = max(int(LOW * sums), PROGRAM_BYTES + facts.weight_bytes if settings.tunes else 0)
    where = "memory" if device == "cpu" else "memory of the GPU"
    return MemoryNeed("quantize", where, low, max(int(1.5 * sums), int(1.3 * low)), basis, tuple(advice))


def _package(facts: QuickFacts, config: JobConfig, engine: str, device: str) -> MemoryNeed:
    """Engines that hold the whole model: what they cannot do without, and more as what they may take."""
    weights = sum(prod(tensor.shape) for tensor in facts.headers)
    tokens = config.calibration.SAMPLES * config.calibration.SEQUENCE_LENGTH
    layer = _largest_layer(facts)
    activations = 2 * tokens * _hidden(facts) * 2 if engine != "modelopt" else 0
    base = PROGRAM_BYTES if device == "cpu" else CUDA_BYTES
    low = base + 2 * weights + activations + (layer.grams if engine == "llmcompressor" else 0)
    basis = f"the whole model in 16 bits ({amount(2 * weights)}), which {_TITLES[engine]} keeps in memory"
    basis += f", and activations of {tokens:,} tokens ({amount(activations)})" if activations else ""
    high = int(PACKAGES_HIGH * low) + PACKAGES_MORE
    if engine == "modelopt" and device == "cpu":
        high += 2 * weights
        basis += "; in 32 bits, twice as much, where there is room"
    advice = ["fewer SAMPLES or a shorter SEQUENCE_LENGTH"] if activations > low // 4 else []
    if engine != "modelopt":
        advice.append("ENGINE native, which holds one decoder layer at a time")
    where = "memory" if device == "cpu" else "memory of the GPU"
    return MemoryNeed("quantize", where, low, high, basis, tuple(advice))


_TITLES = {"llmcompressor": "llm-compressor", "autoawq": "autoawq", "modelopt": "nvidia-modelopt"}


def _measuring(facts: QuickFacts, config: JobConfig, device: str) -> MemoryNeed | None:
    """What measuring the 16-bit model needs, which is loaded whole; None if nothing is measured."""
    evaluates, times = config.EVALUATION.ENABLED, config.BENCHMARK.ENABLED and config.ALGORITHM != "TensorRTLLM"
    if not (evaluates or times):
        return None
    weights = sum(prod(tensor.shape) for tensor in facts.headers) * 2
    low = (PROGRAM_BYTES if device == "cpu" else CUDA_BYTES) + weights
    logits = 2 * config.EVALUATION.WINDOW * config.EVALUATION.BATCH_SIZE * _vocabulary(facts) * 4 if evaluates else 0
    keys = [key for key, on in (("EVALUATION.ENABLED", evaluates), ("BENCHMARK.ENABLED", times)) if on]
    return MemoryNeed(
        "measure", "memory" if device == "cpu" else "memory of the GPU", low, int(HIGH * (low + logits)),
        f"the 16-bit model, {amount(weights)}, is loaded whole to be compared with",
        (f"{' and '.join(keys)}: false, which leaves the comparison out",),
    )  # fmt: skip


def _compute_bytes(device: str) -> int:
    return 2 if device != "cpu" or has_bfloat16() else 4


def _hidden(facts: QuickFacts) -> int:
    """Width of the hidden states: the least inputs of a Linear, if config.json does not tell."""
    told = facts.config.get("hidden_size")
    return told if isinstance(told, int) and told > 0 else min(width for _, width in facts.linears.values())


def _vocabulary(facts: QuickFacts) -> int:
    told = facts.config.get("vocab_size")
    return told if isinstance(told, int) and told > 0 else 0


def _largest_layer(facts: QuickFacts) -> _Layer:
    layers: dict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in facts.headers:
        if match := LAYER.search(tensor.name):
            layers[int(match.group(1))].append(tensor)
    tensors = max(layers.values(), key=lambda found: sum(prod(t.shape) for t in found))
    shapes = {t.name: t.shape for t in tensors if t.name.removesuffix(".weight") in facts.linears}
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name, shape in shapes.items():
        groups[_input_of(name)].append(shape)
    return _Layer(
        stored=sum(t.nbytes for t in tensors),
        weights=sum(prod(t.shape) for t in tensors),
        linears=sum(map(prod, shapes.values())),
        widest=max(width for _, width in shapes.values()),
        out=max(out for out, _ in shapes.values()),
        grams=sum(4 * found[0][1] ** 2 for found in groups.values()),
        shared=max(sum(map(prod, found)) for found in groups.values()),
    )


def _input_of(name: str) -> str:
    """Linears of a layer that read the same input have the same answer."""
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    return f"{parent}.{next((min(names) for names in TOGETHER if last in names), last)}"


def _outside_tensors(facts: QuickFacts) -> list[TensorInfo]:
    return sorted((t for t in facts.headers if not LAYER.search(t.name)), key=lambda t: artefact_order(t.name))


def _outside_bytes(facts: QuickFacts) -> Iterable[int]:
    return [tensor.nbytes for tensor in _outside_tensors(facts)] or [0]


def _embedding(facts: QuickFacts) -> int:
    return max(_outside_bytes(facts))


def _outside(facts: QuickFacts) -> int:
    """Bytes while tensors outside the layers are stored: one, the one before it, and its copies in other types."""
    peak = before = 0
    for tensor in _outside_tensors(facts):
        peak = max(peak, before + 2 * tensor.nbytes + 4 * prod(tensor.shape))
        before = tensor.nbytes
    return peak
