from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from backend.errors import CheckpointError, ModelError
from backend.formats.compressed_tensors import pack_bits
from backend.formats.headers import SINGLE_FILE
from backend.formats.loader import load_model, load_tokenizer
from backend.formats.packed_int8 import PackedInt8Linear, PermutedLinear
from backend.formats.packed_linear import PackedInt4Linear
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.models import make_model, stored, tokens, write

RTN32 = Recipe("r", Scheme("RTN", 4, 32))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("mistral", {"sliding_window": 8}),
    ],
)
def test_plain_folder_gives_transformers_own_logits(tmp_path: Path, kind: str, changes: dict[str, object]) -> None:
    folder = make_model(tmp_path, kind, torch.float32, **changes)
    ids = tokens(2, 20)
    with torch.no_grad():
        ours = load_model(folder, dtype=torch.float32)
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert not ours.training
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())


def test_generates(tmp_path: Path) -> None:
    model = load_model(make_model(tmp_path))
    assert model.dtype == torch.bfloat16
    out = model.generate(tokens(1, 4), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    return write(make_model(folder / "source"), folder / "out", RTN32, layout="autoawq-gemm")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    return write(make_model(folder / "source", "qwen2"), folder / "out", RTN32)


def damage(artefact: Path, folder: Path, **changes: torch.Tensor | None) -> Path:
    tensors = load_file(artefact / SINGLE_FILE)
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, folder / SINGLE_FILE)
    (folder / "config.json").write_text((artefact / "config.json").read_text())
    return folder


Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        ("model.norm.weight", None, "model.norm.weight.*in none"),
        (f"{Q}.qweight", None, "tensor.*q_proj.weight.*in none"),
        (f"{Q}.scales", None, "lacks scales"),
        (f"{Q}.scales", torch.ones(3, 128).half(), "shapes"),
        ("model.layers.9.junk", torch.ones(1), "1 tensors that LlamaForCausalLM does not have"),
        ("model.layers.9.qweight", torch.ones(1), "of another model"),
        ("model.norm.weight", torch.ones(65), r"shape \(65,\).*\(128,\)"),
    ],
)
def test_tensors_that_do_not_fit(
    artefact: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_model(damage(artefact, tmp_path, **{name: tensor}))


def test_a_stored_copy_of_tied_embeddings_must_be_one(tmp_path: Path) -> None:
    folder = make_model(tmp_path, tie_word_embeddings=True)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / SINGLE_FILE)
    model = load_model(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    write(folder, tmp_path / "out", RTN32)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / SINGLE_FILE)
    tensors["lm_head.weight"] += 1
    save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load_model(folder)


def test_truncated_file(artefact: Path, tmp_path: Path) -> None:
    folder = damage(artefact, tmp_path)
    data = (folder / SINGLE_FILE).read_bytes()
    (folder / SINGLE_FILE).write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_model(folder)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"bits": 3}, "bits 3"),
        ({"version": "marlin"}, "'MARLIN'"),
        ({"group_size": -1}, "group_size -1"),
    ],
)
def test_other_quantizations_are_refused(
    artefact: Path, tmp_path: Path, change: dict[str, object], reason: str
) -> None:
    folder = damage(artefact, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason):
        load_model(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"auto_map": {"AutoModelForCausalLM": "evil.Model"}},
        {"_attn_implementation_internal": "someone/kernel"},
        {"attn_implementation": "someone/kernel"},
        {"text_config": {"auto_map": {}}},
    ],
)
def test_remote_code_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    folder = make_model(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    for load in (load_model, load_tokenizer):
        with pytest.raises(ModelError, match="code"):
            load(folder)


def test_missing_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer of"):
        load_tokenizer(make_model(tmp_path))


@pytest.mark.parametrize("layout", ["autoawq-gemm", "autoawq-gemv", "compressed-tensors"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("qwen2", {}),
        ("mistral", {"num_key_value_heads": 4}),
        ("opt", {}),
        ("gpt_neox", {}),
    ],
)
def test_packed_logits_equal_those_of_the_dequantized_weights(
    tmp_path: Path, layout: str, kind: str, changes: dict[str, object]
) -> None:
    write(make_model(tmp_path / "source", kind, **changes), tmp_path / "out", RTN32, layout=layout)
    packed = load_model(tmp_path / "out", dtype=torch.float32)
    linears = {n: m for n, m in packed.named_modules() if isinstance(m, PackedInt4Linear)}
    assert len(linears) == {"opt": 12, "gpt_neox": 8}.get(kind, 14)
    dense = load_model(tmp_path / "source", dtype=torch.float32)
    for name, linear in linears.items():
        dense.get_submodule(name).weight.data = linear.dequantize()
    parts = (".qweight", ".qzeros", ".scales", "_packed", "_scale", "_shape", "_zero_point")
    plain = {n: t.float() for n, t in stored(tmp_path / "out").items() if not n.endswith(parts)}
    state = {("lm_head.weight" if n == "embed_out.weight" else n): t for n, t in plain.items()}
    dense.load_state_dict(state, strict=False)  # float16 in the artefact
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def edit_config(artefact: Path, folder: Path, change: dict[str, object], group: dict[str, object]) -> Path:
    """A copy with another quantization_config."""
    config = json.loads((damage(artefact, folder) / "config.json").read_text())
    found = config["quantization_config"]
    found |= change
    found["config_groups"]["group_0"] |= group
    (folder / "config.json").write_text(json.dumps(config))
    return folder


P = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("name", "tensor", "reason"),
    [
        (f"{P}.weight_scale", None, f"{P} lacks weight_scale"),
        (f"{P}.weight_packed", None, f"tensor {P}.weight .*in none"),
        (f"{P}.weight_zero_point", torch.zeros(3, 3, dtype=torch.int32), f"{P}: weight_zero_point"),
        (f"{P}.weight_scale", torch.ones(128, 3).half(), f"{P}: weight_packed and weight_scale"),
        (f"{P}.weight", torch.ones(128, 256).half(), f"{P} is also stored unpacked"),
        (f"{P}.weight_g_idx", torch.zeros(256, dtype=torch.int32), f"{P}: weight_g_idx"),
        ("model.layers.1.self_attn.q_proj.bias", None, "q_proj.bias is in none"),
        ("model.layers.1.self_attn.q_proj.bias", torch.ones(3).half(), "q_proj.bias has shape"),
    ],
)
def test_broken_compressed_tensors(
    packed: Path, tmp_path: Path, name: str, tensor: torch.Tensor | None, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        load_model(damage(packed, tmp_path, **{name: tensor}))


def test_a_packed_linear_without_scheme(packed: Path, tmp_path: Path) -> None:
    folder = edit_config(packed, tmp_path, {}, {"targets": ["re:.*self_attn.*"]})
    with pytest.raises(CheckpointError, match="mlp.*no config group"):
        load_model(folder)


def test_names_win_over_patterns_and_patterns_over_classes(tmp_path: Path) -> None:
    overrides = (Override(P, Scheme("RTN", 8, -1, True)), Override("*.q_proj", Scheme("RTN", 3, 64)))
    recipe = Recipe("r", RTN32.scheme, overrides)
    folder = write(make_model(tmp_path / "source"), tmp_path / "out", recipe)
    config = json.loads((folder / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    by_bits = {g["weights"]["num_bits"]: g for g in groups.values()}
    by_bits[4]["targets"], by_bits[3]["targets"], by_bits[8]["targets"] = ["Linear"], ["re:.*q_proj$"], [P]
    before = load_model(folder, dtype=torch.float32)
    (folder / "config.json").write_text(json.dumps(config))
    after = load_model(folder, dtype=torch.float32)
    assert isinstance(after.get_submodule(P), PackedInt8Linear)
    ids = tokens(1, 9)
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_groups_of_any_inputs(packed: Path, tmp_path: Path) -> None:
    """Older GPTQ checkpoints with act-order: columns stay in place, weight_g_idx names their groups."""
    linear = load_model(packed, dtype=torch.float32).get_submodule(P)
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    g_idx = torch.empty(256, dtype=torch.int32)
    g_idx[order] = torch.arange(256, dtype=torch.int32) // 32  # column order[k] is the k-th in the order of groups
    within = torch.cat([columns.sort().values for columns in order.view(8, 32)])
    codes = linear._kernel.unpack(linear.packed, 128, 256) if linear._kernel else None
    if codes is None:
        pytest.skip("no int4 kernel here")
    placed = torch.empty_like(codes)
    placed[:, within] = codes
    folder = damage(packed, tmp_path, **{f"{P}.weight_packed": pack_bits(placed, 4), f"{P}.weight_g_idx": g_idx})
    permuted = load_model(folder, dtype=torch.float32).get_submodule(P)
    assert isinstance(permuted, PermutedLinear)
    x = torch.randn(3, 256)
    torch.testing.assert_close(permuted(x), linear(x[:, within]), rtol=1e-5, atol=1e-5)
    for unused in (torch.full((256,), -1), torch.arange(256) // 32):
        folder = damage(packed, tmp_path, **{f"{P}.weight_g_idx": unused.int()})
        assert isinstance(load_model(folder).get_submodule(P), PackedInt4Linear)


def test_peer_program_reads_our_gemm_artefact(artefact: Path) -> None:
    awq = pytest.importorskip("awq", reason="needs the autoawq package")
    from awq.modules.linear.gemm import WQLinear_GEMM

    assert awq
    tensors = load_file(artefact / SINGLE_FILE)
    packed = load_model(artefact, dtype=torch.float32).get_submodule(Q)
    theirs = WQLinear_GEMM(4, 32, 128, 128, False, "cpu")
    for part in ("qweight", "qzeros", "scales"):
        setattr(theirs, part, tensors[f"{Q}.{part}"])
    x = torch.randn(4, 128)
    torch.testing.assert_close(theirs(x.half()).float(), packed(x), rtol=1e-2, atol=1e-2)
