from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from backend.errors import CheckpointError, ConfigError
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, read_headers
from backend.formats.weight import QuantizedWeight
from backend.formats.writer import CheckpointWriter
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.models import make_model, random_weight, write


def test_single_file_with_what_travels_along(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (source / "notes.bin").write_bytes(b"\x80")
    writer = CheckpointWriter(tmp_path / "out", source)
    writer.add("norm", torch.tensor([1.0, 2.0], dtype=torch.bfloat16))
    writer.add_linear("proj", random_weight(8, 64, 32), torch.zeros(8))
    assert not (tmp_path / "out/config.json").exists()  # a folder without it is unfinished
    out = writer.finish({})
    tensors = load_file(out / SINGLE_FILE)
    assert set(tensors) == {"norm", "proj.qweight", "proj.qzeros", "proj.scales", "proj.bias"}
    assert tensors["norm"].dtype == tensors["proj.bias"].dtype == torch.float16
    assert sorted(p.name for p in out.iterdir()) == [
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (out / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["quantization_config"]["version"] == "gemm"
    assert AutoConfig.from_pretrained(out).quantization_config["group_size"] == 32


def test_shards_and_index(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    writer = CheckpointWriter(tmp_path / "out", source, dtype=None, max_shard_bytes=1000)
    values = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}  # 400 bytes each
    for name, value in values.items():
        writer.add(name, value)
    out = writer.finish({})
    index = json.loads((out / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert {t.name: t.file for t in read_headers(out)} == index["weight_map"]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(out / file)[name], values[name])
    assert not list(out.glob("*.part"))


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16"), (None, "F32")])
def test_dtype_of_other_tensors(tmp_path: Path, dtype: str | None, stored: str) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"), dtype=dtype)
    writer.add("a", torch.ones(2))
    writer.add("i", torch.ones(2, dtype=torch.int64))
    writer.add("h", torch.ones(2), source_dtype=torch.bfloat16)  # widened for computing
    writer.add("model.norm.weight", torch.ones(128))  # widened too: the source's files say bfloat16
    found = {t.name: t.dtype for t in read_headers(writer.finish({}))}
    source = stored if dtype else "BF16"
    assert found == {"a": stored, "i": "I64", "h": source, "model.norm.weight": source}


@pytest.mark.parametrize("layout", ["autoawq-gemm", "autoawq-gemv", "compressed-tensors"])
@pytest.mark.parametrize("source_dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", None])
def test_every_stored_dtype(tmp_path: Path, layout: str, source_dtype: torch.dtype, dtype: str | None) -> None:
    """Also of biases, of codes and of scales; and config.json says the same."""
    source = make_model(tmp_path / "source", "qwen2", source_dtype, num_hidden_layers=1)
    out = write(source, tmp_path / "out", Recipe("r", Scheme("RTN", 4, 32)), layout=layout, dtype=dtype)
    types = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
    plain = types[getattr(torch, dtype)] if dtype else types[source_dtype]
    scale = plain if layout == "compressed-tensors" and plain != "F32" else "F16"
    parts = {
        "qweight": "I32",
        "qzeros": "I32",
        "scales": "F16",
        "weight_packed": "I32",
        "weight_zero_point": "I32",
        "weight_shape": "I64",
        "weight_scale": scale,
    }
    found = {t.name: t.dtype for t in read_headers(out)}
    assert found == {name: parts.get(name.rpartition(".")[2], plain) for name in found}
    assert len(found) == 3 + 2 + 7 * (4 if layout == "compressed-tensors" else 3) + 3
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[plain]


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"))
    with pytest.raises(CheckpointError, match=r"norm.*9.984e\+04.*bfloat16"):
        writer.add("norm", torch.tensor([1.0, -1e5], dtype=torch.bfloat16))


def test_bad_requests(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    with pytest.raises(ConfigError, match="'MARLIN'; allowed are autoawq-gemm, .*compressed-tensors, aqlm"):
        CheckpointWriter(tmp_path / "out", source, layout="MARLIN")
    with pytest.raises(ConfigError, match="'int8'"):
        CheckpointWriter(tmp_path / "out", source, dtype="int8")
    with pytest.raises(ConfigError, match="the model itself"):
        CheckpointWriter(source, source)
    writer = CheckpointWriter(tmp_path / "out", source)
    writer.add("a", torch.ones(2))
    with pytest.raises(CheckpointError, match="twice"):
        writer.add("a", torch.ones(2))


def test_what_a_layout_cannot_hold(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    anything = CheckpointWriter(tmp_path / "a", source, layout="compressed-tensors")
    assert anything.refusal(Scheme(bits=3, group_size=-1), (9, 64)) is None
    for layout in ("autoawq-gemm", "autoawq-gemv"):
        writer = CheckpointWriter(tmp_path / "b", source, layout=layout, group_size=64)
        cases = [
            (Scheme(bits=3), (8, 64), "4 bits, not 3"),
            (Scheme(group_size=-1), (8, 64), "not whole rows"),
            (Scheme(group_size=32), (8, 64), "one group size, here 64"),
            (Scheme(group_size=64), (12, 64), "12 outputs are no multiple of 8"),
        ]
        for scheme, shape, reason in cases:
            assert reason in str(writer.refusal(scheme, shape))
        assert writer.refusal(Scheme(group_size=64, symmetric=True), (8, 64)) is None


def test_the_first_accepted_group_size_counts(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    writer = CheckpointWriter(tmp_path / "out", source)
    assert writer.refusal(Scheme(group_size=32), (9, 64))
    assert writer.refusal(Scheme(group_size=64), (8, 64)) is None
    again = CheckpointWriter(tmp_path / "out", source)
    again.restore(json.loads(json.dumps(writer.commit())))
    for each in (writer, again):
        assert "here 64" in str(each.refusal(Scheme(group_size=32), (8, 64)))
        with pytest.raises(CheckpointError, match="proj cannot be stored: .*one group size"):
            each.add_linear("proj", random_weight(8, 64, 32))


def changed(weight: QuantizedWeight, **parts: object) -> QuantizedWeight:
    return QuantizedWeight(**{**vars(weight), **parts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"scale": torch.full((8, 2), float("nan")).half()}, "not all finite"),
        ({"scale": torch.ones(8, 2)}, "torch.float32.* stores torch.float16"),
        ({"q": torch.full((8, 64), 8, dtype=torch.uint8)}, "beyond 3 bits"),
        ({"zero": torch.full((8, 2), 8, dtype=torch.uint8)}, "beyond 3 bits"),
        ({"symmetric": True}, "not all zeros are 4"),
    ],
)
def test_weights_that_would_be_read_wrongly(tmp_path: Path, parts: dict[str, object], reason: str) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"), layout="compressed-tensors")
    with pytest.raises(CheckpointError, match=f"proj cannot be stored: .*{reason}"):
        writer.add_linear("proj", changed(random_weight(8, 64, 32, bits=3), **parts))


def test_kept_linears_of_autoawq(tmp_path: Path) -> None:
    recipe = Recipe("r", Scheme("RTN", 4, 32), (Override("model.layers.1.mlp.*", None),), keep=("k_proj",))
    out = write(make_model(tmp_path / "source"), tmp_path / "out", recipe, layout="autoawq-gemm")
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == [
        "model.layers.0.self_attn.k_proj",
        "model.layers.1.self_attn.k_proj",
        *(f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")),
        "lm_head",
    ]


def test_kept_and_quantized_is_a_contradiction(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path / "out", make_model(tmp_path / "source"))
    writer.add_linear("model.layers.0.mlp.up_proj", random_weight(8, 64, 32))
    with pytest.raises(CheckpointError, match="up_proj was stored quantized, but is listed as kept: a reason"):
        writer.finish({"model.layers.0.mlp.up_proj": "a reason"})


def test_a_model_that_has_only_a_configuration(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source")
    (source / SINGLE_FILE).unlink()
    writer = CheckpointWriter(tmp_path / "out", source, layout="compressed-tensors")
    writer.add_linear("model.layers.0.mlp.up_proj", random_weight(8, 64, 32))
    config = json.loads((writer.finish({}) / "config.json").read_text())["quantization_config"]
    assert "model.layers.0.mlp.up_proj" not in config["ignore"]
    assert {"model.layers.0.mlp.gate_proj", "lm_head"} < set(config["ignore"])


def test_no_quantized_linear_gives_a_plain_model(tmp_path: Path) -> None:
    out = write(make_model(tmp_path / "source"), tmp_path / "out", Recipe("r", keep=("proj",)))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
