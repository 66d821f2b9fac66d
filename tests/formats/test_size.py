from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.errors import CheckpointError, ConfigError
from backend.formats.headers import read_headers
from backend.formats.size import artefact_order, is_layer_linear, predicted_size, weight_bytes
from backend.quantize.recipe import Override, Recipe, Scheme
from tests.formats.models import make_model, write

RECIPES = {
    "w4": Recipe("w4", Scheme("RTN", 4, 64), keep=("lm_head", "k_proj")),
    "w3-sym-channel": Recipe("w3", Scheme("RTN", 3, -1, True)),
    "mixed": Recipe(
        "mixed",
        Scheme("RTN", 4, 128),
        (
            Override("*.0.mlp.*", Scheme("RTN", 8, -1)),
            Override("*.up_proj", None),
            Override("*.q_proj", Scheme("RTN", 2, 32)),
            Override("*.v_proj", Scheme("RTN", 4, 32, True)),
        ),
        misfit="fit",
    ),
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
@pytest.mark.parametrize("layout", ["autoawq-gemm", "autoawq-gemv", "compressed-tensors"])
@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "shard"),
    [
        ("llama", {}, "float16", 2**30),
        ("llama", {"tie_word_embeddings": True, "intermediate_size": 160}, "bfloat16", 40_000),
        ("qwen2", {"num_hidden_layers": 3}, None, 9_000),
        ("opt", {}, None, 50_000),
        ("gpt_neox", {}, "float16", 50_000),
    ],
)
def test_prediction_is_exact(
    tmp_path: Path, recipe: Recipe, layout: str, kind: str, changes: dict[str, object], dtype: str | None, shard: int
) -> None:
    source = make_model(tmp_path / "source", kind, **changes)
    out = write(source, tmp_path / "out", recipe, layout=layout, dtype=dtype, max_shard_bytes=shard)
    config = json.loads((source / "config.json").read_text())
    predicted = predicted_size(read_headers(source), config, recipe, layout=layout, dtype=dtype, max_shard_bytes=shard)
    assert predicted == weight_bytes(out) == sum(p.stat().st_size for p in out.glob("*.safetensors"))


def test_unknown_layouts_are_named() -> None:
    with pytest.raises(ConfigError, match="'gguf'; allowed are autoawq-gemm"):
        predicted_size([], {}, Recipe("r"), layout="gguf")


@pytest.mark.parametrize("prefix", ["model.layers.11", "model.decoder.layers.11", "gpt_neox.layers.11"])
def test_layers_of_every_architecture(prefix: str) -> None:
    assert artefact_order(f"{prefix}.fc.weight")[0] == 11
    assert is_layer_linear(f"{prefix}.fc.weight", (2, 2))
    assert not is_layer_linear(f"{prefix}.fc.bias", (2,))
    assert not is_layer_linear("model.embed_tokens.weight", (2, 2))


def test_weight_bytes_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        weight_bytes(tmp_path)


def test_headers_and_sizes_import_no_torch() -> None:
    code = "import sys, backend.formats.headers, backend.formats.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
