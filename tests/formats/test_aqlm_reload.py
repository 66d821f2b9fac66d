"""What we write loads through transformers and the aqlm package; the check that jobs make of it finds what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.errors import CheckpointError, EngineError
from backend.formats.additive_reader import read_additive
from backend.formats.aqlm_check import TOLERANCE, _check_weights, _difference, _peers_model, check_reload
from backend.formats.headers import SINGLE_FILE
from backend.quantize.aqlm.scheme import AdditiveScheme
from tests.formats.additive import write_additive
from tests.formats.crash import digest
from tests.formats.models import make_model

pytest.importorskip("aqlm")
pytest.importorskip("numba")
S2X8 = AdditiveScheme(2, 8, 8)
# All Linears of one shape: aqlm's CPU kernel is compiled anew for each, in seconds.
SQUARE: dict[str, Any] = {"num_key_value_heads": 4, "intermediate_size": 128}
WIDE: dict[str, Any] = {"hidden_size": 256, "num_key_value_heads": 4}
LARGE: dict[str, Any] = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("scheme", "kind", "changes", "dtype", "linears"),
    [
        (S2X8, "llama", SQUARE, "float16", 14),
        (S2X8, "llama", SQUARE | {"tie_word_embeddings": True}, "bfloat16", 14),
        (S2X8, "qwen2", SQUARE, "float16", 14),
        (S2X8, "llama", {"num_key_value_heads": 4, "intermediate_size": 132}, "float16", 12),  # down_proj does not fit
        (AdditiveScheme(1, 8, 8), "llama", SQUARE, "float16", 14),
        (AdditiveScheme(3, 8, 8), "llama", SQUARE, "float16", 14),
        (AdditiveScheme(1, 12, 8), "qwen2", WIDE | {"tie_word_embeddings": True}, "float16", 14),
        (AdditiveScheme(1, 16, 8), "llama", LARGE, "float16", 3),  # the other Linears have fewer groups than words
        (AdditiveScheme(2, 5, 4), "qwen3", {}, "float16", 14),
    ],
    ids=lambda v: getattr(v, "label", v if isinstance(v, str) else ""),
)
def test_transformers_with_aqlm_reads_what_we_wrote(
    tmp_path: Path, scheme: AdditiveScheme, kind: str, changes: dict[str, Any], dtype: str, linears: int
) -> None:
    source = make_model(tmp_path / "source", kind, **changes)
    out = write_additive(source, tmp_path / "out", scheme, dtype=dtype)
    before = digest(out)
    found = check_reload(out)
    assert found.linears == linears == len(dict(read_additive(out)))
    assert 0 <= found.difference < 2e-5 < TOLERANCE
    assert digest(out) == before  # nothing was saved over it


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artefact")
    source = make_model(folder / "source", num_hidden_layers=1, **WIDE)
    return write_additive(source, folder / "out", AdditiveScheme(1, 12, 8), keep=("k_proj",))


def listed(artefact: Path, folder: Path, names: list[str]) -> Path:
    """A copy that lists other names as not quantized."""
    config = json.loads((artefact / "config.json").read_text())
    config["quantization_config"]["linear_weights_not_to_quantize"] = names
    (folder / "config.json").write_text(json.dumps(config))
    save_file(load_file(artefact / SINGLE_FILE), folder / SINGLE_FILE, {"format": "pt"})
    return folder


def test_the_official_list_of_weight_paths_alone_is_found_out(artefact: Path, tmp_path: Path) -> None:
    k = "model.layers.0.self_attn.k_proj"
    with pytest.raises(CheckpointError, match=r"transformers with aqlm .*(lm_head|k_proj)"):
        check_reload(listed(artefact, tmp_path, ["lm_head.weight", f"{k}.weight"]))


def test_a_list_that_keeps_too_much_is_found_out(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"transformers with aqlm .*v_proj"):
        check_reload(listed(artefact, tmp_path, ["lm_head", "model.layers.0.self_attn.k_proj", "v_proj"]))


def test_codes_out_of_range_and_missing_files_are_found_out(artefact: Path, tmp_path: Path) -> None:
    folder = listed(artefact, tmp_path, ["lm_head", "model.layers.0.self_attn.k_proj"])
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.layers.0.mlp.up_proj.codes"][0, 0, 0] = 3000  # the package takes it modulo 4096
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj: codes lie between .* and 3000; allowed are -2048 to 2047"):
        check_reload(folder)
    (folder / SINGLE_FILE).unlink()
    with pytest.raises(CheckpointError, match="does not load with transformers and aqlm"):
        check_reload(folder)


def test_another_weight_is_named(artefact: Path, tmp_path: Path) -> None:
    folder = listed(artefact, tmp_path, ["lm_head", "model.layers.0.self_attn.k_proj"])
    names = {name: name for name, _ in read_additive(artefact)}
    peer = _peers_model(artefact)
    _check_weights(artefact, peer, names)
    tensors = load_file(folder / SINGLE_FILE)
    tensors["model.layers.0.mlp.up_proj.scales"][3] *= 1.001
    save_file(tensors, folder / SINGLE_FILE, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the weight of model.layers.0.mlp.up_proj differs .* by up to"):
        _check_weights(folder, peer, names)


def test_other_logits_are_refused(tmp_path: Path) -> None:
    ours = torch.randn(2, 3, 50)
    assert _difference(tmp_path, ours, ours) == 0
    for change in (0.01, float("nan")):
        theirs = ours.clone()
        theirs[1, 2, 7] += change
        with pytest.raises(CheckpointError, match="the logits differ .* allowed is 0.001"):
            _difference(tmp_path, theirs, ours)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, artefact: Path) -> None:
    monkeypatch.setitem(sys.modules, "aqlm", None)
    with pytest.raises(EngineError, match=r"aqlm is not installed. Run pip install 'aqlm\[cpu\]'"):
        check_reload(artefact)
