"""Packing, names and refusals of AQLM's layout, against the aqlm package's own packing where it has one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from backend.errors import CheckpointError, ConfigError, ModelError
from backend.formats import aqlm
from backend.formats.additive_reader import read_additive, read_scheme, read_unquantized
from backend.formats.additive_weight import AdditiveWeight
from backend.formats.bits import measured_bits, predicted_bits, true_bits
from backend.formats.headers import SINGLE_FILE, read_headers
from backend.formats.size import is_layer_linear, predicted_additive_size, weight_bytes
from backend.formats.writer import CheckpointWriter
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.additive import random_additive, write_additive
from tests.formats.models import make_model, random_weight, stored, write

S2X8, S1X12 = AdditiveScheme(2, 8, 8), AdditiveScheme(1, 12, 8)


@pytest.mark.parametrize("nbits", [1, 5, 8, 9, 12, 16])
def test_codes_are_packed_as_the_package_packs_them(nbits: int) -> None:
    package = pytest.importorskip("aqlm.utils")
    scheme = AdditiveScheme(3, nbits, 4)
    weight = random_additive(24, 96, scheme)
    edge = torch.tensor([0, scheme.words - 1, scheme.words // 2, scheme.words // 2 - 1], dtype=torch.int32)
    weight.codes.view(-1)[:4] = edge
    tensors = aqlm.pack(weight)
    theirs = package.pack_int_data(weight.codes.long(), nbits)
    assert tensors["codes"].dtype == theirs.dtype
    assert torch.equal(tensors["codes"], theirs)
    assert [tuple(t.shape) for t in tensors.values()] == [(24, 24, 3), (3, scheme.words, 1, 4), (24, 1, 1, 1)]
    back = aqlm.unpack(tensors, scheme)
    for part in ("codes", "codebooks", "scales"):
        assert torch.equal(getattr(back, part), getattr(weight, part))
    assert torch.equal(back.codes.long(), package.unpack_int_data(tensors["codes"], nbits))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codes": torch.zeros(8, 4, 2, dtype=torch.int16)}, "codes are torch.int16.*torch.int8"),
        ({"codes": torch.zeros(8, 4, 3, dtype=torch.int8)}, "have shapes"),
        ({"codes": torch.zeros(0, 4, 2, dtype=torch.int8)}, "have shapes"),
        ({"codes": torch.zeros(8, dtype=torch.int8)}, "have shapes"),
        ({"codes": torch.full((8, 4, 2), 16, dtype=torch.int8)}, "codes lie between 16 and 16; allowed are -16 to 15"),
        ({"codes": torch.full((8, 4, 2), -17, dtype=torch.int8)}, "allowed are -16 to 15"),
        ({"codebooks": torch.zeros(2, 64, 1, 8).half()}, "have shapes"),
        ({"codebooks": torch.zeros(2, 32, 2, 8).half()}, "have shapes"),
        ({"codebooks": torch.zeros(2, 32, 1, 8, dtype=torch.int32)}, "floating type"),
        ({"codebooks": torch.full((2, 32, 1, 8), float("nan")).half()}, "codebooks are not all finite"),
        ({"scales": torch.zeros(8, 4, 1, 1).half()}, "have shapes"),
        ({"scales": torch.full((8, 1, 1, 1), float("inf")).half()}, "scales are not all finite"),
    ],
)
def test_tensors_that_contradict_the_scheme(changes: dict[str, torch.Tensor], reason: str) -> None:
    scheme = AdditiveScheme(2, 5, 8)
    tensors = aqlm.pack(random_additive(8, 32, scheme))
    assert aqlm.unpack(tensors, scheme).shape == (8, 32)
    with pytest.raises(CheckpointError, match=reason):
        aqlm.unpack(tensors | changes, scheme)


def test_what_stays_in_16_bits_is_listed_by_name_and_by_path() -> None:
    quantized = ["model.layers.0.mlp.gate_proj", "model.layers.10.mlp.up", "model.layers.0.head"]
    kept = ["model.layers.0.mlp.gate", "model.layers.1.mlp.up", "head"]
    listed = aqlm.quantization_config(S2X8, kept, quantized)["linear_weights_not_to_quantize"]
    assert listed[:3] == ["model.layers.0.mlp.gate$", "model.layers.1.mlp.up", "head$"]
    assert listed[3:] == [f"{name}.weight" for name in kept]
    from transformers.quantizers.quantizers_utils import should_convert_module

    assert [n for n in quantized + kept if should_convert_module(n, listed)] == quantized


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"out_group_size": 2}, "out_group_size 2"),
        ({"num_codebooks": "2"}, "num_codebooks: found '2'"),
        ({"nbits_per_codebook": 17}, "nbits_per_codebook: found 17"),
        ({"in_group_size": None}, "in_group_size: found None"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, object], reason: str) -> None:
    config = aqlm.quantization_config(S2X8, ["lm_head"], [])
    assert aqlm.scheme_of(config) == S2X8
    with pytest.raises(ModelError, match=reason):
        aqlm.scheme_of(config | changes)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), "qwen2", torch.float32)


def test_files_and_what_is_read_from_them(tmp_path: Path, source: Path) -> None:
    out = write_additive(source, tmp_path / "out", S2X8, keep=("k_proj",))
    found = {t.name: (t.dtype, t.shape) for t in read_headers(out)}
    down = "model.layers.1.mlp.down_proj"
    assert found[f"{down}.codes"] == ("I8", (128, 32, 2))
    assert found[f"{down}.codebooks"] == ("F16", (2, 256, 1, 8))
    assert found[f"{down}.scales"] == ("F16", (128, 1, 1, 1))
    assert f"{down}.weight" not in found
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    kept = ["model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj", "lm_head"]
    assert config["quantization_config"] == {
        "quant_method": "aqlm",
        "in_group_size": 8,
        "out_group_size": 1,
        "num_codebooks": 2,
        "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": kept + [f"{name}.weight" for name in kept],
    }
    assert read_scheme(out) == S2X8
    linears = dict(read_additive(out))
    assert len(linears) == 12 and list(linears)[0].startswith("model.layers.0.")
    order = sorted((t.name for t in read_headers(source)), key=lambda n: (".layers." in n, n))
    assert torch.equal(linears[down].codes, random_additive(128, 256, S2X8, seed=order.index(f"{down}.weight")).codes)
    plain, before = dict(read_unquantized(out)), stored(source)
    assert linears.keys().isdisjoint(name.removesuffix(".weight") for name in plain)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.k_proj.weight", "model.norm.weight"):
        assert torch.equal(plain[name], before[name].half())
    with pytest.raises(ModelError, match="holds no quantization; an AQLM checkpoint is needed"):
        next(read_additive(source))


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"codebooks": torch.zeros(2, 128, 8)}, "one scheme, here aqlm-2x8-g8"),
        ({"codebooks": torch.zeros(2, 200, 8)}, "its codes, codebooks and scales have shapes|one scheme"),
        ({"codebooks": torch.full((2, 256, 8), 1e5)}, "not all finite in float16"),
        ({"scales": torch.full((64,), float("nan"))}, "not all finite"),
        ({"scales": torch.ones(63)}, "have shapes"),
        ({"codes": torch.full((64, 8, 2), 256, dtype=torch.int32)}, "codes beyond 8 bits"),
        ({"codes": torch.full((64, 8, 2), -1, dtype=torch.int32)}, "codes beyond 8 bits"),
        ({"codes": torch.zeros(64, 8, 1, dtype=torch.int32)}, "have shapes"),
        (
            {"codes": torch.zeros(16, 8, 2, dtype=torch.int32), "scales": torch.ones(16)},
            "128 groups, fewer than the 256 words",
        ),
    ],
)
def test_weights_that_cannot_be_stored(tmp_path: Path, source: Path, parts: dict[str, object], reason: str) -> None:
    writer = CheckpointWriter(tmp_path / "out", source, layout="aqlm")
    writer.add_additive("model.layers.0.mlp.up_proj", random_additive(64, 64, S2X8))
    weight = AdditiveWeight(**{**vars(random_additive(64, 64, S2X8, dtype=torch.float32)), **parts})  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=f"gate_proj cannot be stored: .*({reason})"):
        writer.add_additive("model.layers.0.mlp.gate_proj", weight)


def test_layouts_refuse_what_is_not_theirs(tmp_path: Path, source: Path) -> None:
    writer = CheckpointWriter(tmp_path / "a", source, layout="aqlm")
    assert writer.refusal(Scheme(), (64, 128)) == "the aqlm layout holds codebooks, not gptq-w4-g128"
    assert writer.refusal(S2X8, (64, 100)) == "in_group_size 8 does not divide its 100 inputs"
    assert writer.refusal(S2X8, (64, 128)) is None
    with pytest.raises(CheckpointError, match="up_proj cannot be stored: the aqlm layout holds codebooks"):
        writer.add_linear("up_proj", random_weight(8, 64, 32))
    for layout in ("autoawq-gemm", "compressed-tensors"):
        other = CheckpointWriter(tmp_path / "b", source, layout=layout)
        with pytest.raises(CheckpointError, match=f"the {layout} layout holds no codebooks"):
            other.add_additive("up_proj", random_additive(64, 64, S2X8))


def test_a_restored_writer_goes_on_with_the_same_scheme(tmp_path: Path, source: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", source, layout="aqlm")
    writer.add_additive("model.layers.0.mlp.up_proj", random_additive(64, 64, S2X8))
    again = CheckpointWriter(tmp_path / "out", source, layout="aqlm")
    again.restore(json.loads(json.dumps(writer.commit())))
    with pytest.raises(CheckpointError, match="one scheme, here aqlm-2x8-g8"):
        again.add_additive("model.layers.0.mlp.gate_proj", random_additive(64, 64, AdditiveScheme(1, 8, 8)))
    with pytest.raises(CheckpointError, match="up_proj was stored quantized, but is listed as kept"):
        again.finish({"model.layers.0.mlp.up_proj": "a reason"})


@pytest.mark.parametrize("scheme", [S2X8, S1X12, AdditiveScheme(3, 5, 4)], ids=lambda s: s.label)
@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "shard"),
    [
        ("llama", {}, "float16", 2**30),
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 260}, "bfloat16", 40_000),
        ("qwen2", {"num_hidden_layers": 3}, None, 30_000),
    ],
)
def test_size_and_bits_are_known_before(
    tmp_path: Path, scheme: AdditiveScheme, kind: str, changes: dict[str, object], dtype: str | None, shard: int
) -> None:
    model = make_model(tmp_path / "source", kind, **changes)
    out = write_additive(model, tmp_path / "out", scheme, keep=("o_proj",), dtype=dtype, max_shard_bytes=shard)
    config, headers = json.loads((model / "config.json").read_text()), read_headers(model)
    predicted = predicted_additive_size(headers, config, scheme, keep=("o_proj",), dtype=dtype, max_shard_bytes=shard)
    assert predicted == weight_bytes(out)
    shapes = {t.name.removesuffix(".weight"): t.shape for t in headers if is_layer_linear(t.name, t.shape)}
    quantized = {n: s for n, s in shapes.items() if "o_proj" not in n and not scheme.misfit(*s)}
    weights = sum(a * b for a, b in quantized.values())
    expected = sum(scheme.stored_bits(*shape) for shape in quantized.values()) / weights
    assert true_bits(out) == predicted_bits(shapes, scheme, keep=("o_proj",)) == expected
    found = measured_bits(out)
    assert found.weights == sum(a * b for a, b in shapes.values()) == found.kept + weights
    assert found.linears == (expected * weights + 16 * found.kept) / found.weights
    assert true_bits(model) == 16


@pytest.mark.parametrize("layout", ["autoawq-gemm", "autoawq-gemv", "compressed-tensors"])
@pytest.mark.parametrize(
    "recipe",
    [
        Recipe("w4", Scheme("RTN", 4, 32), keep=("k_proj",)),
        Recipe("w3", Scheme("RTN", 3, -1, True), (Override("*.0.mlp.*", Scheme("RTN", 8, 64)),)),
    ],
    ids=lambda r: r.name,
)
def test_bits_of_the_other_layouts(tmp_path: Path, source: Path, layout: str, recipe: Recipe) -> None:
    headers = read_headers(source)
    shapes = {t.name.removesuffix(".weight"): t.shape for t in headers if is_layer_linear(t.name, t.shape)}
    if recipe.name == "w3" and layout != "compressed-tensors":
        with pytest.raises(ConfigError, match="none of the 14 Linears"):
            predicted_bits(shapes, recipe, layout)
        return
    out = write(source, tmp_path / "out", recipe, layout=layout)
    assert true_bits(out) == predicted_bits(shapes, recipe, layout)
    if recipe.name == "w4" and layout != "autoawq-gemv":
        assert true_bits(out) == 4 + 16 / 32 + 4 / 32


def test_bits_of_broken_files(tmp_path: Path, source: Path) -> None:
    out = write_additive(source, tmp_path / "out", S2X8)
    tensors = load_file(out / SINGLE_FILE)
    from safetensors.torch import save_file

    del tensors["model.layers.0.mlp.up_proj.codebooks"]
    save_file(tensors, out / SINGLE_FILE)
    with pytest.raises(CheckpointError, match=r"up_proj has no usable 'codebooks'"):
        true_bits(out)


def test_nothing_here_needs_numba_or_aqlm_to_be_imported(tmp_path: Path, source: Path) -> None:
    code = (
        "import sys; sys.modules.update(numba=None, aqlm=None);"
        "import backend.formats.aqlm_check, backend.formats.writer, backend.formats.additive_reader;"
        "from backend.formats.loader import load_model; from backend.formats.decode_path import decode_path;"
        "print(decode_path(load_model(sys.argv[1])))"
    )
    out = write_additive(source, tmp_path / "out", S2X8)
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert re.search(r"AQLM 2x8 g8: dequantised once at load, bfloat16 \(numba is not installed\)", done.stdout)
    light = "import sys, backend.formats.bits, backend.formats.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", light], check=False).returncode == 0
