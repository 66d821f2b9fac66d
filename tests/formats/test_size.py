from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from backend.errors import CheckpointError
from backend.formats.headers import read_headers
from backend.formats.size import predicted_size, weight_bytes
from backend.formats.writer import CheckpointWriter
from backend.quantize import AwqSettings, quantize_awq
from tests.quantize.tiny import make_model, tokens


@pytest.mark.parametrize("version", ["GEMM", "GEMV"])
@pytest.mark.parametrize(
    ("kind", "changes", "dtype", "shard"),
    [
        ("llama", {}, "float16", 2**30),
        ("llama", {"tie_word_embeddings": True}, "bfloat16", 20_000),
        ("qwen2", {"num_hidden_layers": 3}, None, 9_000),
    ],
)
def test_prediction_is_exact(
    tmp_path: Path, version: str, kind: str, changes: dict[str, object], dtype: str | None, shard: int
) -> None:
    source = make_model(tmp_path / "source", kind, **changes)
    settings = AwqSettings(group_size=64, clip=False, scale_grid=2, modules_to_not_convert=("lm_head", "k_proj"))
    writer = CheckpointWriter(tmp_path / "out", source, version=version, dtype=dtype, max_shard_bytes=shard)
    quantize_awq(source, tokens(1, 8), settings, writer)
    out = writer.finish()
    config = json.loads((source / "config.json").read_text())
    predicted = predicted_size(
        read_headers(source), config, settings, version=version, dtype=dtype, max_shard_bytes=shard
    )
    assert predicted == weight_bytes(out) == sum(p.stat().st_size for p in out.glob("*.safetensors"))


def test_weight_bytes_of_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors"):
        weight_bytes(tmp_path)


def test_headers_and_sizes_import_no_torch() -> None:
    code = "import sys, backend.formats.headers, backend.formats.size; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
