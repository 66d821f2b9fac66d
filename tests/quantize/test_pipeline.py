"""Whole models: what is reported must be what is stored."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from backend.errors import ModelError
from backend.formats.autoawq import unpack
from backend.formats.headers import SINGLE_FILE
from backend.formats.loader import load_model
from backend.formats.packed_linear import PackedInt4Linear
from backend.quantize import AwqSettings, LayerReport
from tests.quantize.tiny import SETTINGS, logits, make_model, quantize, tokens

KINDS = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen2", {}),
    ("qwen3", {}),
    ("mistral", {"num_key_value_heads": 4, "sliding_window": 8}),
]


@pytest.mark.parametrize(("kind", "changes"), KINDS)
def test_every_layer_gains_and_the_model_keeps_its_function(
    tmp_path: Path, kind: str, changes: dict[str, object]
) -> None:
    source = make_model(tmp_path / "source", kind, **changes)
    seen: list[LayerReport] = []
    stages: list[str] = []
    report = quantize(source, tmp_path / "awq", on_layer=seen.append, on_stage=stages.append)
    assert seen == report.layers
    assert [(r.name, r.index, r.total) for r in seen] == [("model.layers.0", 0, 2), ("model.layers.1", 1, 2)]
    assert stages == ["check", "embed", "layers"]
    assert report.tokens == 6 * 24
    for layer in report.layers:
        assert 0 < layer.relative_error < 0.95 * layer.rtn_relative_error
        assert layer.notes == ()
    quantize(source, tmp_path / "rtn", AwqSettings(group_size=32, scale_grid=0, clip=False))
    exact = logits(source)
    error = {name: float((logits(tmp_path / name) - exact).norm()) for name in ("awq", "rtn")}
    assert error["awq"] < error["rtn"]
    assert error["awq"] < 0.5 * float(exact.norm())


def original_coordinates(folder: Path, layer: int, source: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The effective weights of the artefact on the source's inputs: folds taken back with the stored norms."""
    stored = load_file(folder / SINGLE_FILE)
    prefix = f"model.layers.{layer}."

    def dense(name: str) -> torch.Tensor:
        parts = {p: stored[f"{prefix}{name}.{p}"] for p in ("qweight", "qzeros", "scales")}
        return unpack(parts, "GEMM", 32).dequantize(torch.float64)

    def ratio(norm: str) -> torch.Tensor:
        name = f"{prefix}{norm}.weight"
        return stored[name].double() / source[name].double()

    out = {n: dense(n) * ratio("input_layernorm") for n in ("self_attn.q_proj", "self_attn.k_proj")}
    return out | {"mlp.gate_proj": dense("mlp.gate_proj") * ratio("post_attention_layernorm")}


@torch.no_grad()
def test_reported_error_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    """Reported energies equal the error of the artefact's own outputs in a float64 run on the original inputs."""
    source = make_model(tmp_path / "source")
    keep = ("lm_head", "v_proj", "o_proj", "up_proj", "down_proj")
    settings = AwqSettings(group_size=32, modules_to_not_convert=keep)
    report = quantize(source, tmp_path / "out", settings)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
    inputs: dict[str, torch.Tensor] = {}
    layer = model.model.layers[1]
    for name, module in layer.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.__setitem__(name, args[0].flatten(0, 1)))
    model(tokens())
    error = signal = 0.0
    for name, weight in original_coordinates(tmp_path / "out", 1, load_file(source / SINGLE_FILE)).items():
        exact = layer.get_submodule(name).weight
        error += float((inputs[name] @ (weight - exact).T).square().sum())
        signal += float((inputs[name] @ exact.T).square().sum())
    assert report.layers[1].relative_error == pytest.approx(error / signal, rel=1e-3)
    assert set(report.skipped) == {
        f"model.layers.{i}.{n}"
        for i in range(2)
        for n in ("self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    }


def test_linears_left_alone_are_stored_dense(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    settings = AwqSettings(group_size=32, modules_to_not_convert=("lm_head", "layers.1", "k_proj"))
    quantize(source, tmp_path / "out", settings)
    model = load_model(tmp_path / "out")
    packed = {n for n, m in model.named_modules() if isinstance(m, PackedInt4Linear)}
    assert len(packed) == 6
    assert not any("layers.1" in n or "k_proj" in n for n in packed)
    before, after = load_file(source / SINGLE_FILE), load_file(tmp_path / "out" / SINGLE_FILE)
    untouched = [n for n in before if "layers.1" in n or "layers" not in n]
    assert untouched
    for name in untouched:
        assert torch.equal(after[name], before[name].half()), name


def test_result_does_not_depend_on_the_microbatch(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    reports = [quantize(source, tmp_path / str(m), microbatch=m) for m in (1, 4, 6)]
    for report in reports[1:]:
        for a, b in zip(reports[0].layers, report.layers, strict=True):
            assert a.relative_error == pytest.approx(b.relative_error, rel=0.02)  # a tie may round the other way
    torch.testing.assert_close(logits(tmp_path / "1"), logits(tmp_path / "6"), rtol=0.05, atol=0.05)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    for out in ("a", "b"):
        quantize(source, tmp_path / out)
    assert (tmp_path / "a" / SINGLE_FILE).read_bytes() == (tmp_path / "b" / SINGLE_FILE).read_bytes()


def test_layouts_hold_the_same_numbers(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    for version in ("GEMM", "GEMV"):
        quantize(source, tmp_path / version, version=version)
    assert torch.equal(logits(tmp_path / "GEMM"), logits(tmp_path / "GEMV"))


def test_symmetric_weights_have_zero_eight(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    report = quantize(source, tmp_path / "out", AwqSettings(group_size=32, zero_point=False))
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    zeros = [t for n, t in stored.items() if n.endswith("qzeros")]
    assert zeros
    assert all(bool((t == torch.tensor(0x88888888 - 2**32, dtype=torch.int32)).all()) for t in zeros)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["zero_point"] is True  # qzeros are there and count
    assert all(r.relative_error <= r.rtn_relative_error for r in report.layers)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_types(tmp_path: Path, dtype: str | None, source_dtype: torch.dtype) -> None:
    source = make_model(tmp_path / "source", dtype=source_dtype, num_hidden_layers=1)
    quantize(source, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    expected = getattr(torch, dtype) if dtype else source_dtype
    for name, tensor in stored.items():
        kind = name.rpartition(".")[2]
        assert tensor.dtype == {"qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16}.get(
            kind, expected
        )
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == str(expected).removeprefix("torch.")


def test_bfloat16_forward_passes_change_little(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    exact = quantize(source, tmp_path / "exact")
    fast = quantize(source, tmp_path / "fast", dtype_=torch.bfloat16)
    for a, b in zip(exact.layers, fast.layers, strict=True):
        assert a.relative_error == pytest.approx(b.relative_error, rel=0.05)


def test_unsupported_models_are_refused_before_weights_are_read(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    quantize(source, tmp_path / "out")
    with pytest.raises(ModelError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again")
    with pytest.raises(ModelError, match="64 inputs.*128"):
        quantize(source, tmp_path / "wide", AwqSettings(group_size=128))
    assert SETTINGS.group_size == 32


def test_core_needs_only_torch_transformers_and_safetensors() -> None:
    code = """
import sys
for name in ("pydantic", "datasets", "psutil", "gradio", "plotly", "ruamel", "sqlite_utils", "lm_eval"):
    sys.modules[name] = None  # importing it fails
import backend.quantize, backend.formats.loader, backend.formats.writer
"""
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
