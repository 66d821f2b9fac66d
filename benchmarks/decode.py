"""Decode speed of packed Linears (int4, AQLM 2x8) against bfloat16 on this machine's CPU, batch 1.

    python -m benchmarks.decode [--tokens 16] [--repetitions 7] [--layers]

Random models are made in memory: one of the demo's shape and one of TinyLlama's (1.1 billion parameters); with
`--layers`, single Linears instead, so many of each that they do not fit into a cache. Speed does not depend on the
values of weights. Repetitions alternate between the forms, so that a machine that gets slower gets slower for all;
ratios are medians of the ratios of neighbouring repetitions.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, PreTrainedModel

from backend.formats.additive_linear import AdditiveLinear
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.skeleton import build_skeleton
from backend.formats.weight import QuantizedWeight

GROUP_SIZE = 128
PROMPT_TOKENS = 32
SHAPES = {
    "demo (384 wide, 4 layers)": {
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "vocab_size": 2048,
    },
    "1.1B (2048 wide, 22 layers)": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}

LAYERS = ((2048, 2048), (5632, 2048), (4096, 4096))
LAYER_BYTES = 2**28
"""Of the bfloat16 weights of all copies of a Linear: more than a cache holds."""


def make_pair(
    config: LlamaConfig, form: Callable[..., nn.Module], device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same architecture in bfloat16 and with packed Linears; embeddings and head are shared."""
    dense, packed = (build_skeleton(config, torch.bfloat16) for _ in range(2))
    shared: dict[str, nn.Parameter] = {}
    for model in (dense, packed):
        for name, parameter in list(model.named_parameters()):
            parent, _, leaf = name.rpartition(".")
            module = model.get_submodule(parent)
            if isinstance(module, nn.Linear) and ".layers." in name and model is packed:
                model.set_submodule(parent, form(*parameter.shape, device=device))
                continue
            if name not in shared or ".layers." in name:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
                shared[name] = nn.Parameter(value + (1.0 if "norm" in name else 0.0), requires_grad=False)
            setattr(module, leaf, shared[name])
        nn.Module.to(model, device)
    return dense, packed


def random_packed(out: int, width: int, device: str = "cpu") -> PackedInt4Linear:
    """A packed Linear of random codes."""
    groups = width // GROUP_SIZE
    weight = QuantizedWeight(
        torch.randint(0, 16, (out, width), dtype=torch.uint8),
        torch.full((out, groups), 0.004, dtype=torch.float16),
        torch.full((out, groups), 8, dtype=torch.uint8),
    )
    return PackedInt4Linear(weight, device=device)


def random_additive(out: int, width: int, device: str = "cpu") -> AdditiveLinear:
    """A Linear of random AQLM codes, 2x8 with groups of 8."""
    weight = AdditiveWeight(
        torch.randint(0, 256, (out, width // 8, 2), dtype=torch.int32),
        torch.randn(2, 256, 8, dtype=torch.float16) * 0.01,
        torch.ones(out, dtype=torch.float16),
    )
    assert device == "cpu"
    return AdditiveLinear(weight, dtype=torch.bfloat16)


FORMS: dict[str, Callable[..., nn.Module]] = {"int4": random_packed, "AQLM 2x8": random_additive}


@torch.inference_mode()
def seconds_per_token(model: PreTrainedModel, tokens: int) -> float:
    """Median time of one greedy decoding step after a short prompt, in seconds."""
    device = model.get_input_embeddings().weight.device
    cache = DynamicCache(config=model.config)
    ids = torch.arange(PROMPT_TOKENS, device=device)[None]
    times = []
    for _ in range(tokens + 1):
        began = time.perf_counter()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first step is the prompt


def compare(dense: PreTrainedModel, packed: PreTrainedModel, tokens: int, repetitions: int) -> dict[str, float]:
    """Median seconds per token of both, and the median and range of bf16's time over the packed model's."""
    for model in (dense, packed):
        seconds_per_token(model, 2)  # warm-up
    pairs = [(seconds_per_token(dense, tokens), seconds_per_token(packed, tokens)) for _ in range(repetitions)]
    ratios = [a / b for a, b in pairs]
    return {
        "bf16_s": statistics.median(a for a, _ in pairs),
        "packed_s": statistics.median(b for _, b in pairs),
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
    }


@torch.inference_mode()
def compare_layers(out: int, width: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of one row of x through a Linear in each form, in turns; the copies of a Linear one after the other."""
    copies = max(LAYER_BYTES // (2 * out * width), 2)

    def dense(dtype: torch.dtype) -> Callable[..., nn.Module]:
        return lambda out, width: nn.Linear(width, out, bias=False, dtype=dtype)

    makers = {"float32": dense(torch.float32), "bfloat16": dense(torch.bfloat16), **FORMS}
    forms = {name: [make(out, width) for _ in range(copies)] for name, make in makers.items()}
    rows = {name: torch.randn(1, width, dtype=_type_of(name)) for name in forms}
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repetition in range(repetitions + 1):  # the first one is the warm-up
        for name, linears in forms.items():
            began = time.perf_counter()
            for linear in linears:
                linear(rows[name])
            if repetition:
                times[name].append((time.perf_counter() - began) / copies)
    return times


def _type_of(form: str) -> torch.dtype:
    return torch.float32 if form == "float32" else torch.bfloat16


def print_layers(repetitions: int) -> None:
    print(f"{'Linear':<14}{'form':<10}{'ms':>9}{'bf16 / it':>12}")
    for out, width in LAYERS:
        times = compare_layers(out, width, repetitions)
        for name, values in times.items():
            ratios = [a / b for a, b in zip(times["bfloat16"], values, strict=True)]
            spread = f"({min(ratios):.2f}..{max(ratios):.2f})"
            print(
                f"{f'{out} x {width}':<14}{name:<10}{1e3 * statistics.median(values):>9.3f}"
                f"{statistics.median(ratios):>11.2f}x {spread}",
                flush=True,
            )


def print_models(tokens: int, repetitions: int) -> None:
    print(f"{'model':<30}{'form':<10}{'bf16':>14}{'packed':>14}{'packed / bf16':>16}")
    for name, shape in SHAPES.items():
        for form, make in FORMS.items():
            dense, packed = make_pair(LlamaConfig(**shape), make)
            result = compare(dense, packed, tokens, repetitions)
            speeds = "".join(f"{1 / result[key]:>8.1f} tok/s" for key in ("bf16_s", "packed_s"))
            spread = f"({result['low']:.2f}..{result['high']:.2f})"
            print(f"{name:<30}{form:<10}{speeds}{result['ratio']:>9.2f}x {spread}", flush=True)
            del dense, packed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16, help="tokens per repetition")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--layers", action="store_true", help="single Linears instead of models")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    now = datetime.datetime.now(datetime.UTC)
    print(f"{now:%Y-%m-%d %H:%M} UTC, torch {torch.__version__}, {torch.get_num_threads()} threads, {cpu_name()}")
    print(f"{arguments.repetitions} alternating repetitions, batch 1, int4 in groups of {GROUP_SIZE}")
    if arguments.layers:
        print_layers(arguments.repetitions)
    else:
        print_models(arguments.tokens, arguments.repetitions)


def cpu_name() -> str:
    """The processor's name, with the vector instructions that torch uses."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{names[0] if names else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
