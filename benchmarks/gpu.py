"""The core on a CUDA machine: checks against float64, then times. Needs torch, transformers, safetensors.

    sh benchmarks/gpu.sh [--small] [--device cuda:0]

Makes random Llama-shaped models in a temporary folder, quantizes them on the GPU, reads the artefacts back, and
compares packing, products, logits and speed with 16-bit references. The last lines are a table.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

try:
    import safetensors
    import torch
    import transformers
    from safetensors.torch import save_file
except ImportError as error:
    print(f"benchmarks.gpu needs torch, transformers and safetensors: {error}.", file=sys.stderr)
    sys.exit(2)

from backend.formats.autoawq import pack, unpack
from backend.formats.int4_kernels import kernel_for
from backend.formats.loader import load_model
from backend.formats.packed_linear import PackedInt4Linear
from backend.formats.size import weight_bytes
from backend.formats.skeleton import build_skeleton
from backend.formats.weight import QuantizedWeight
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.presets import PRESETS
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import fit
from backend.quantize.pipeline import quantize as run
from backend.quantize.recipe import Recipe, Scheme
from backend.quantize.report import QuantizationReport
from benchmarks.decode import SHAPES, compare
from benchmarks.gpu_modelopt import check_modelopt

SMALL = {
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 2048,
}
MEDIUM = SHAPES["1.1B (2048 wide, 22 layers)"]
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # of Llama 3.1 8B
SAMPLES, LENGTH = 128, 512
OUTPUT_TOLERANCE = 6e-3  # bfloat16 scales, shifts, products and outputs, relative Frobenius norm
LOGIT_TOLERANCE = 3e-2  # the same through all layers
CODE_TOLERANCE = 2e-2  # share of codes that another order of sums may round the other way


@dataclass
class Results:
    """Rows of the final table and the checks that failed."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, name: str, value: str) -> None:
        """One row; also printed at once, as progress."""
        self.rows.append((name, value))
        print(f"  {name}: {value}", flush=True)

    def check(self, name: str, value: float, limit: float) -> None:
        """One row with a limit."""
        passed = value <= limit
        self.add(name, f"{value:.2e} (limit {limit:.0e}) {'ok' if passed else 'FAILED'}")
        if not passed:
            self.failures.append(name)


def make_model(folder: Path, shape: dict[str, int], device: str) -> Path:
    """A random bfloat16 checkpoint, drawn on the device and written tensor by tensor."""
    config = transformers.LlamaConfig(**shape, max_position_embeddings=2048, tie_word_embeddings=False)
    config.architectures = ["LlamaForCausalLM"]
    generator = torch.Generator(device).manual_seed(0)
    (folder / "model").mkdir()
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_by_layer(config).values()):
        tensors = {}
        for name, size in names.items():
            value = torch.empty(size, device=device).normal_(0.0, 0.02, generator=generator)
            tensors[name] = ((value * 10).exp() if "norm" in name else value).bfloat16().cpu()
        file = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, folder / "model" / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))
    config.save_pretrained(folder / "model")
    return folder / "model"


def _by_layer(config: transformers.PretrainedConfig) -> dict[str, dict[str, torch.Size]]:
    """Parameters of each decoder layer, and of the rest, with their shapes."""
    files: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in build_skeleton(config, torch.bfloat16).named_parameters():
        files.setdefault(".".join(name.split(".")[:3]), {})[name] = parameter.shape
    return files


def quantize(
    source: Path,
    out: Path,
    device: str,
    layout: str = "autoawq-gemm",
    samples: int = SAMPLES,
    scheme: Scheme = Scheme("AWQ"),  # noqa: B008 - frozen
) -> tuple[Path, QuantizationReport, float]:
    """Quantize with random calibration tokens; the artefact, the report and the seconds it took."""
    vocabulary = load_vocabulary(source)
    tokens = torch.randint(0, vocabulary, (samples, LENGTH), generator=torch.Generator().manual_seed(1))
    began = time.perf_counter()
    writer = CheckpointWriter(out, source, layout=layout)
    recipe = Recipe(scheme.label, scheme)
    report = run(source, tokens, [recipe], [writer], device=device, dtype=torch.bfloat16)
    return writer.finish(report.kept[recipe.name]), report, time.perf_counter() - began


def load_vocabulary(source: Path) -> int:
    """Number of tokens that a model knows."""
    return int(transformers.AutoConfig.from_pretrained(source).vocab_size)


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative Frobenius error."""
    return float((found.double() - exact.double()).norm() / exact.double().norm())


def check_kernels(results: Results, device: str) -> None:
    """Packing round trips and products of single Linears against float64."""
    kernel = kernel_for(torch.device(device))
    results.add("packed int4 kernel", f"tile {kernel.tile}" if kernel else "none: falls back to dequantising")
    generator = torch.Generator().manual_seed(2)
    lost = 0
    for out, width, group_size in ((512, 512, 128), (1536, 512, 64), (256, 2048, 32), (40, 96, 32)):
        groups = width // group_size
        weight = QuantizedWeight(
            torch.randint(0, 16, (out, width), generator=generator, dtype=torch.uint8).to(device),
            (torch.rand(out, groups, generator=generator) * 0.01 + 0.001).half().to(device),
            torch.randint(0, 16, (out, groups), generator=generator, dtype=torch.uint8).to(device),
        )
        for version in ("GEMM", "GEMV"):
            back = unpack(pack(weight, version), version, group_size)
            same = all(torch.equal(getattr(back, f), getattr(weight, f)) for f in ("q", "scale", "zero"))
            lost += 0 if same else 1
        linear = PackedInt4Linear(weight, device=device)
        for rows in (1, 7, 16, 200):
            x = torch.randn(rows, width, generator=generator).to(device, torch.bfloat16)
            exact = x.double() @ weight.dequantize(torch.float64).T
            results.check(
                f"product {out}x{width} g{group_size}, {rows} rows", relative(linear(x), exact), OUTPUT_TOLERANCE
            )
    results.check("GEMM/GEMV round trips lost", lost, 0)


@torch.no_grad()
def check_small(results: Results, folder: Path, device: str) -> None:
    """A small model: both layouts, CPU against CUDA, packed against dense logits."""
    source = make_model(folder, SMALL, device)
    gemm, report, _ = quantize(source, folder / "gemm", device, samples=16)
    gemv, _, _ = quantize(source, folder / "gemv", device, "autoawq-gemv", samples=16)
    on_cpu, cpu_report, _ = quantize(source, folder / "cpu", "cpu", samples=16)
    gptq, gptq_report, _ = quantize(source, folder / "gptq", device, "compressed-tensors", 16, Scheme("GPTQ", 3, 64))
    load_model(gptq, device)
    worse_gptq = sum(layer.relative_error > 0.8 * layer.rtn_relative_error for layer in gptq_report.layers)
    results.check("GPTQ layers not well below plain rounding", worse_gptq, 0)
    worse = sum(layer.relative_error > layer.rtn_relative_error for layer in report.layers)
    results.check("layers worse than plain rounding", worse, 0)
    drift = max(
        abs(a.relative_error / b.relative_error - 1) for a, b in zip(report.layers, cpu_report.layers, strict=True)
    )
    results.check("layer errors, CUDA against CPU", drift, CODE_TOLERANCE)
    ids = torch.randint(0, SMALL["vocab_size"], (2, 64), generator=torch.Generator().manual_seed(3)).to(device)
    models = {name: load_model(path, device) for name, path in (("gemm", gemm), ("gemv", gemv), ("cpu", on_cpu))}
    logits = {name: model(ids).logits for name, model in models.items()}
    results.check("logits, GEMV against GEMM", relative(logits["gemv"], logits["gemm"]), 1e-6)
    dense = load_model(gemm, device)
    for name, module in list(dense.named_modules()):
        if isinstance(module, PackedInt4Linear):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device=device)
            linear.weight = torch.nn.Parameter(module.dequantize(), requires_grad=False)
            dense.set_submodule(name, linear)
    results.check("logits, prompt path", relative(logits["gemm"], dense(ids).logits), LOGIT_TOLERANCE)
    results.check("logits, decode path", relative(models["gemm"](ids[:1, :1]).logits, dense(ids[:1, :1]).logits), LOGIT_TOLERANCE)  # fmt: skip  # noqa: E501


def time_model(results: Results, folder: Path, device: str, shape: dict[str, int], name: str) -> None:
    """Quantization time and memory, and decode speed from the artefact on disk."""
    source = make_model(folder, shape, device)
    _, report, seconds = quantize(source, folder / "gptq", device, "compressed-tensors", scheme=Scheme("GPTQ"))
    results.add(f"{name}: GPTQ", f"{seconds:.1f} s for {report.tokens} tokens")
    torch.cuda.reset_peak_memory_stats(device)
    out, report, seconds = quantize(source, folder / "out", device)
    forward = sum(layer.calibrate_s for layer in report.layers)
    results.add(f"{name}: AWQ", f"{seconds:.1f} s for {report.tokens} tokens ({forward:.1f} s forward and Gram)")
    results.add(f"{name}: peak GPU memory", f"{torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    results.add(f"{name}: weight files", f"{weight_bytes(source) / 1e6:.0f} MB -> {weight_bytes(out) / 1e6:.0f} MB")
    speed = compare(load_model(source, device), load_model(out, device), tokens=64, repetitions=5)
    results.add(
        f"{name}: decode, batch 1",
        f"bf16 {1 / speed['bf16_s']:.1f} tok/s, int4 {1 / speed['packed_s']:.1f} tok/s, "
        f"{speed['ratio']:.2f}x ({speed['low']:.2f}..{speed['high']:.2f})",
    )


def time_aqlm(results: Results, device: str, shape: dict[str, int], name: str) -> None:
    """One decoder layer of a model, its Linears one after the other, and what the whole model would take."""
    generator = torch.Generator(device).manual_seed(4)
    hidden, middle, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    linears = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden), (middle, hidden), (middle, hidden)]
    for scheme in (AdditiveScheme(1, 16, 8), AdditiveScheme(2, 8, 8)):
        seconds, errors = 0.0, []
        for out, width in (*linears, (hidden, middle)):
            if scheme.misfit(out, width):
                results.add(f"{name}: AQLM {scheme.label}", "not measured: a Linear has fewer groups than words")
                break
            inputs = torch.randn(2 * width, width, device=device, generator=generator)
            H = inputs.T @ inputs  # noqa: N806
            W = torch.randn(out, width, device=device, generator=generator) * 0.02  # noqa: N806
            del inputs
            _wait(device)
            began = time.perf_counter()
            errors.append(fit(W, H, scheme, PRESETS["default"], seed=0).relative_error)
            _wait(device)
            seconds += time.perf_counter() - began
        else:
            told = f"{seconds:.1f} s a layer, {seconds * layers / 60:.1f} min for {layers} layers (extrapolated)"
            results.add(f"{name}: AQLM {scheme.label}", told)
            results.check(f"{name}: AQLM {scheme.label}, largest error", max(errors), 0.25)


def run_modelopt(results: Results, folder: Path, device: str) -> None:
    """Every method of nvidia-modelopt, where it is installed."""
    check_modelopt(results, make_model(folder, SMALL, device), folder, device)


def _wait(device: str) -> None:
    """For what a GPU still has to do."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="skip the 1.1B and 8B models")
    parser.add_argument("--device", default="cuda:0")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "No CUDA device is available to torch here; this benchmark measures nothing without one.", file=sys.stderr
        )
        return 3
    device = arguments.device
    torch.cuda.set_device(device)
    results = Results()
    parts: list[tuple[str, Callable[[Path], None]]] = [
        ("kernels", lambda folder: check_kernels(results, device)),
        ("small model", lambda folder: check_small(results, folder, device)),
        ("small model, times", lambda folder: time_model(results, folder, device, SMALL, "small")),
        ("small model, modelopt", lambda folder: run_modelopt(results, folder, device)),
    ]
    if not arguments.small:
        parts.append(("1.1B model", lambda folder: time_model(results, folder, device, MEDIUM, "1.1B")))
        parts.append(("8B model", lambda folder: time_model(results, folder, device, LARGE, "8B")))
        parts.append(("8B layer, AQLM", lambda folder: time_aqlm(results, device, LARGE, "8B")))
    for title, part in parts:
        print(title, flush=True)
        with tempfile.TemporaryDirectory() as folder:
            part(Path(folder))
        torch.cuda.empty_cache()
    print_table(results, device)
    return 1 if results.failures else 0


def print_table(results: Results, device: str) -> None:
    """Everything once more, with what it was measured on."""
    properties = torch.cuda.get_device_properties(device)
    width = max(len(name) for name, _ in results.rows)
    print(f"\n{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {properties.name}, ", end="")
    print(f"{properties.total_memory / 2**30:.0f} GiB, compute {properties.major}.{properties.minor}, ", end="")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, ", end="")
    print(f"safetensors {safetensors.__version__}")
    for name, value in results.rows:
        print(f"{name:<{width}}  {value}")
    print(f"{len(results.failures)} checks failed" + "".join(f"\n  {name}" for name in results.failures))


if __name__ == "__main__":
    sys.exit(main())
