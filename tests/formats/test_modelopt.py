"""What nvidia-modelopt exports, read back: its own tensors, its own model in memory, and files that somebody broke."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from backend.engines.modelopt_files import rewrite
from backend.errors import CheckpointError, ModelError
from backend.formats.bits import measured_bits, predicted_modelopt_bits
from backend.formats.decode_path import decode_path
from backend.formats.headers import read_headers
from backend.formats.loader import load_model
from backend.formats.modelopt_layout import ModeloptScheme
from backend.formats.size import predicted_modelopt_size, weight_bytes
from backend.tensorrt_llm.methods import METHODS
from tests.formats.modelopt_exports import Export, ids, make_export

ON_CPU = [name for name, method in METHODS.items() if not method.needs_cuda]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "exaone4, norms behind": ("exaone4", {}),
    "nemotron, no gate": ("nemotron", {}),
    "llama": ("llama", {}),
    "tied qwen2 with biases": ("qwen2", {"tie_word_embeddings": True}),
}
CASES = [("llama", method) for method in ON_CPU] + [
    ("tied qwen2 with biases", "int4_awq"),
    ("tied qwen2 with biases", "smoothquant"),
    ("exaone4, norms behind", "int4_awq"),
    ("nemotron, no gate", "int4_awq"),
]
Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"
FP8_HALF_STEP, FP8_TINY = 2.0**-4, 2.0**-10
"""Half a step of FP8 E4M3: of the number itself (3 bits of mantissa), or below the smallest normal number."""
FLOAT16_HALF_STEP = 2.0**-11
TRT_NAMES = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.dense": ("self_attn.o_proj",),
    "mlp.fc": ("mlp.gate_proj",),
    "mlp.gate": ("mlp.up_proj",),
    "mlp.proj": ("mlp.down_proj",),
}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Export]]:
    made: dict[tuple[str, str], Export] = {}

    def get(method: str, kind: str = "llama") -> Export:
        if (kind, method) not in made:
            architecture, changes = KINDS[kind]
            made[kind, method] = make_export(tmp_path_factory.mktemp("export"), method, architecture, **changes)
        return made[kind, method]

    yield get


def logits_of(folder: Path) -> Tensor:
    with torch.no_grad():
        logits: Tensor = load_model(folder, dtype=torch.float32)(ids()).logits
    return logits


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_logits_are_those_of_the_quantized_model_in_memory(
    export: Callable[..., Export], kind: str, method: str
) -> None:
    made = export(method, kind)
    # float32 arithmetic alone gives about 1e-6. With int8 inputs a last bit in front of a rounding to one of 255 steps
    # can move a value by a whole step, and all layers after it.
    tolerance = 0.02 if method == "smoothquant" else 1e-5
    assert difference(made.logits, made.before) > 2 * tolerance  # what a reader that forgets something could hide in
    assert difference(logits_of(made.folder), made.logits) < tolerance


def bound(weight: Tensor, step: Tensor, method: str, second: Tensor | None = None) -> Tensor:
    """The largest error that rounding to nearest makes: half a step, whatever that is in the type.

    Args:
        weight: (out, in).
        step: Spread over (out, in).
        second: Step of the FP8 numbers that 4-bit weights become.
    """
    if method == "fp8":
        return weight.abs() * FP8_HALF_STEP + step * FP8_TINY
    half = step / 2
    return half if second is None else half + (weight.abs() + half) * FP8_HALF_STEP + second * FP8_TINY


def spread(scale: Tensor, shape: torch.Size) -> Tensor:
    if scale.dim() < 2:
        return scale.double().reshape(-1, 1).expand(shape)
    return scale.double().repeat_interleave(shape[1] // scale.shape[1], dim=1)


def test_transformers_alone_reads_an_export_wrong_without_a_word(export: Callable[..., Export]) -> None:
    """Why there is a reader of our own, and why exports are never measured through `from_pretrained`."""
    made = export("fp8")
    plain = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32)
    with torch.no_grad():
        found = plain(ids()).logits
    assert difference(found, made.logits) > 0.3
    assert difference(logits_of(made.folder), made.logits) < 1e-4


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_weights_are_the_originals_but_for_the_rounding(export: Callable[..., Export], kind: str, method: str) -> None:
    made = export(method, kind)
    stored = load_file(made.folder / "model.safetensors")
    model = load_model(made.folder, dtype=torch.float32)
    assert made.weights and METHODS[method].quant_algo in decode_path(model)
    for name, weight in made.weights.items():
        found = model.get_submodule(name).weight.double()
        second = stored.get(f"{name}.weight_scale_2")
        allowed = bound(weight, spread(stored[f"{name}.weight_scale"], weight.shape), method, second)
        assert ((found - weight).abs() <= allowed + 1e-6 * weight.abs()).all(), name
        assert (found - weight).abs().max() > 0


@pytest.mark.parametrize("method", ON_CPU)
def test_tensorrt_llms_checkpoint_holds_the_same_weights(export: Callable[..., Export], method: str) -> None:
    made = export(method)
    trt = load_file(made.checkpoint / "rank0.safetensors")
    source, stored = (load_file(folder / "model.safetensors") for folder in (made.source, made.folder))
    model = load_model(made.folder, dtype=torch.float32)
    for layer in range(2):
        for theirs, ours in TRT_NAMES.items():
            prefix = f"transformer.layers.{layer}.{theirs}"
            codes, scale = trt[f"{prefix}.weight"], trt[f"{prefix}.weights_scaling_factor"]
            values = codes.double()
            if METHODS[method].grouped:  # two rows in a byte, the first one in the low half
                low, high = (codes << 4) >> 4, codes >> 4
                values = torch.stack((low, high), dim=1).flatten(0, 1).double()
            step = spread(scale, values.shape)
            values = values * step
            names = [f"model.layers.{layer}.{name}" for name in ours]
            original = torch.cat([source[f"{name}.weight"].double() for name in names])
            factors = trt.get(f"{prefix}.prequant_scaling_factor", torch.ones(original.shape[1])).double()
            smoothed = original / factors
            # Weight and factors are rounded to float16, each by at most half a step.
            error = bound(smoothed, step, method) + 2 * smoothed.abs() * FLOAT16_HALF_STEP
            assert ((values - smoothed).abs() <= error * 1.001).all(), prefix
            if METHODS[method].grouped and theirs in ("mlp.fc", "mlp.gate"):
                continue  # these two have factors of their own here, and common ones in the other export
            loaded = torch.cat([model.get_submodule(name).weight.double() for name in names])
            second = stored[f"{names[0]}.weight_scale_2"].double() if method == "w4a8_awq" else None
            steps = torch.cat([spread(stored[f"{n}.weight_scale"], model.get_submodule(n).weight.shape) for n in names])
            assert ((values - loaded).abs() <= error * 1.001 + bound(smoothed, steps, method, second) * 1.001).all()


def test_which_linears_keep_their_factors_of_inputs(export: Callable[..., Export]) -> None:
    folded = load_file(export("int4_awq").folder / "model.safetensors")
    assert sum(name.endswith("pre_quant_scale") for name in folded) == 2 * 2  # o_proj and down_proj
    assert f"{DOWN}.pre_quant_scale" in folded
    kept = load_file(export("smoothquant").folder / "model.safetensors")
    assert sum(name.endswith("pre_quant_scale") for name in kept) == 2 * 7


@pytest.mark.parametrize(("kind", "method"), CASES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_size_and_bits_are_known_before(
    export: Callable[..., Export], tmp_path: Path, kind: str, method: str, dtype: str
) -> None:
    made = export(method, kind)
    rewrite(made.folder, tmp_path, dtype)
    headers = read_headers(made.source)
    config = json.loads((made.source / "config.json").read_text())
    scheme = ModeloptScheme(METHODS[method].quant_algo)
    assert predicted_modelopt_size(headers, config, scheme, dtype=dtype) == weight_bytes(tmp_path)
    assert measured_bits(tmp_path).quantized == predicted_modelopt_bits(headers, scheme, dtype=dtype)


def copy_of(made: Export, folder: Path) -> Path:
    return Path(shutil.copytree(made.folder, folder / "copy"))


def set_quantization(folder: Path, value: dict[str, Any] | None) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config | ({"quantization_config": value} if value else {})))


@pytest.mark.parametrize("nested", [None, "older"])
def test_configurations_of_older_exports(export: Callable[..., Export], tmp_path: Path, nested: str | None) -> None:
    made = export("w4a8_awq")
    folder = copy_of(made, tmp_path)
    older = json.loads((folder / "hf_quant_config.json").read_text())
    set_quantization(folder, {"quant_method": "modelopt", **older} if nested else None)
    assert torch.equal(logits_of(folder), logits_of(made.folder))


def _nan(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_scale"][0, 0] = math.nan


def _negative(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.input_scale"].neg_()


def _narrow(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight_scale"] = t[f"{Q_PROJ}.weight_scale"][:, :1].clone()


def _factors(t: dict[str, Tensor]) -> None:
    t[f"{DOWN}.pre_quant_scale"] = torch.ones(7)


def _type(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight"] = t[f"{Q_PROJ}.weight"].view(torch.int8)


def _half(t: dict[str, Tensor]) -> None:
    t[f"{Q_PROJ}.weight"] = t[f"{Q_PROJ}.weight"][::2].clone()


def _cache(t: dict[str, Tensor]) -> None:
    t["model.layers.0.self_attn.k_proj.k_scale"] = torch.ones(())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.weight_scale"), f"{Q_PROJ}"),
        (lambda t: t.pop(f"{Q_PROJ}.weight"), "lacks weight"),
        (lambda t: t.pop(f"{Q_PROJ}.input_scale"), "lacks input_scale"),
        (lambda t: t.pop(f"{Q_PROJ}.weight_scale_2"), "lacks weight_scale_2"),
        (_nan, "weight_scale holds numbers that are not positive"),
        (_negative, "input_scale holds numbers that are not positive"),
        (_narrow, r"weight_scale is float32 \(256, 1\)"),
        (_factors, r"pre_quant_scale is float32 \(7,\)"),
        (_type, "weight is int8"),
        (_half, "weight_scale"),
        (_cache, "k_scale"),
    ],
)
def test_broken_tensors_are_refused(
    export: Callable[..., Export], tmp_path: Path, damage: Callable[[dict[str, Tensor]], Any], message: str
) -> None:
    folder = copy_of(export("w4a8_awq"), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, dtype=torch.float32)


@pytest.mark.parametrize("method", ["int8", "fp8"])
def test_codes_without_their_scales_never_pass_for_weights(
    export: Callable[..., Export], tmp_path: Path, method: str
) -> None:
    folder = copy_of(export(method), tmp_path)
    tensors = load_file(folder / "model.safetensors")
    del tensors[f"{DOWN}.weight_scale"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{DOWN}.weight holds .* codes"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"quant_algo": "FP8_PB_WO"}, ModelError, "quant_algo 'FP8_PB_WO'.*W4A16_AWQ"),
        ({"quant_algo": "FP8"}, ModelError, "of two exports"),
        ({"kv_cache_quant_algo": "FP8"}, CheckpointError, "key-value cache"),
        ({"group_size": 0}, ModelError, "group_size 0"),
        ({"group_size": 64}, CheckpointError, "asks for"),
        ({"ignore": "lm_head"}, ModelError, "list of names"),
        ({"ignore": ["*q_proj"]}, CheckpointError, "q_proj is quantized, but config.json lists it"),
    ],
)
def test_wrong_configurations_are_refused(
    export: Callable[..., Export], tmp_path: Path, change: dict[str, Any], error: type[Exception], message: str
) -> None:
    folder = copy_of(export("int4_awq"), tmp_path)
    found = json.loads((folder / "config.json").read_text())["quantization_config"]
    set_quantization(folder, found | change)
    with pytest.raises(error, match=message):
        load_model(folder)
