from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from backend.errors import CheckpointError, ModelError
from backend.formats.headers import SINGLE_FILE
from backend.formats.loader import load_model, load_tokenizer
from backend.formats.packed_linear import PackedInt4Linear
from tests.quantize.tiny import make_model, quantize, tokens


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
    quantize(make_model(folder / "source"), folder / "out")
    return folder / "out"


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
        (f"{Q}.scales", torch.ones(3, 64).half(), "shapes"),
        ("model.layers.9.junk", torch.ones(1), "1 tensors that LlamaForCausalLM does not have"),
        ("model.layers.9.qweight", torch.ones(1), "of another model"),
        ("model.norm.weight", torch.ones(65), r"shape \(65,\).*\(64,\)"),
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
    quantize(folder, tmp_path / "out")
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


@pytest.mark.parametrize("version", ["GEMM", "GEMV"])
@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {}), ("llama", {"tie_word_embeddings": True}), ("qwen2", {}), ("mistral", {"num_key_value_heads": 4})],
)
def test_packed_logits_equal_those_of_the_dequantized_weights(
    tmp_path: Path, version: str, kind: str, changes: dict[str, object]
) -> None:
    quantize(make_model(tmp_path / "source", kind, **changes), tmp_path / "out", version=version)
    packed = load_model(tmp_path / "out", dtype=torch.float32)
    linears = {n: m for n, m in packed.named_modules() if isinstance(m, PackedInt4Linear)}
    assert len(linears) == 14
    dense = AutoModelForCausalLM.from_config(packed.config, dtype=torch.float32).eval()
    stored = load_file(tmp_path / "out" / SINGLE_FILE)
    state = {n: t.float() for n, t in stored.items() if not n.endswith((".qweight", ".qzeros", ".scales"))}
    state |= {f"{n}.weight": m.dequantize() for n, m in linears.items()}
    problems = dense.load_state_dict(state, strict=False)
    assert not problems.unexpected_keys
    assert problems.missing_keys == (["lm_head.weight"] if changes.get("tie_word_embeddings") else [])
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_peer_program_reads_our_gemm_artefact(artefact: Path) -> None:
    awq = pytest.importorskip("awq", reason="needs the autoawq package")
    from awq.modules.linear.gemm import WQLinear_GEMM

    assert awq
    tensors = load_file(artefact / SINGLE_FILE)
    packed = load_model(artefact, dtype=torch.float32).get_submodule(Q)
    theirs = WQLinear_GEMM(4, 32, 64, 64, False, "cpu")
    for part in ("qweight", "qzeros", "scales"):
        setattr(theirs, part, tensors[f"{Q}.{part}"])
    x = torch.randn(4, 64)
    torch.testing.assert_close(theirs(x.half()).float(), packed(x), rtol=1e-2, atol=1e-2)
