"""Windows that do not fit the model, and packings that do not fit the GPU, are told before anything starts."""

from __future__ import annotations

import json
import shutil

import pytest

from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors
from backend.jobs.devices import FAKE_GPUS
from backend.jobs.fit_checks import packing_notes
from backend.jobs.preflight import check_job
from backend.schema import parse_yaml
from tests.conftest import demo_text


def config_of(**changes):
    return parse_yaml(demo_text(**changes)).config


@pytest.fixture
def short_model(home):
    """The demo model with few positions."""
    folder = home.root / "short"
    shutil.copytree(MODEL_DIR, folder)
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**facts, "max_position_embeddings": 256}))
    return str(folder)


@pytest.mark.parametrize(
    ("evaluation", "keys"),
    [
        ({}, {"EVALUATION.WINDOW", "EVALUATION.PROTOCOLS"}),
        ({"PROTOCOLS": ["full_window"], "WINDOW": 258}, {"EVALUATION.WINDOW"}),
        ({"PROTOCOLS": [], "WINDOW": 258}, {"EVALUATION.WINDOW"}),
        ({"PROTOCOLS": ["full_window"], "WINDOW": 257}, set()),
        ({"PROTOCOLS": [], "FIDELITY": False}, set()),
        ({"ENABLED": False}, set()),
    ],
)
def test_windows_longer_than_the_model_are_refused_before_it_is_quantized(home, short_model, evaluation, keys):
    config = config_of(CUSTOM_MODEL_PATH=short_model, EVALUATION={"TASKS": [], **evaluation})
    if not keys:
        assert check_job(config, home)
        return
    with pytest.raises(ConfigErrors) as caught:
        check_job(config, home)
    found = {error.key: error.detail for error in caught.value.errors}
    assert set(found) == keys and all("256 positions" in text for text in found.values())


def gpu(monkeypatch, tmp_path, capability):
    path = tmp_path / "gpus.json"
    path.write_text(json.dumps([{"name": "Old GPU", "capability": capability}]))
    monkeypatch.setenv(FAKE_GPUS, str(path))


def test_a_gpu_that_is_too_old_for_the_packing_is_told(home, monkeypatch, tmp_path):
    gpu(monkeypatch, tmp_path, [7, 0])
    (note,) = [note for note in check_job(config_of(), home).notes if "VERSION" in note]
    assert "VERSION GEMM" in note and "need compute capability 7.5, and GPU 0 (Old GPU) has 7.0" in note
    gpu(monkeypatch, tmp_path, [7, 5])
    assert packing_notes(config_of(), "cuda:0") == []


def test_gemv_is_told_what_it_goes_without():
    gemv = config_of(llm={"AutoAWQ": {"VERSION": "GEMV"}})
    vllm, cpu = packing_notes(gemv, "cpu")
    assert "vLLM reads AutoAWQ's files only in the packing GEMM" in vllm and "need an NVIDIA GPU" in cpu
    native = config_of(ALGORITHM="Native", llm={"Native": {"FORMAT": "GEMV"}})
    assert packing_notes(native, "cpu")[0].startswith("FORMAT GEMV")


@pytest.mark.parametrize("section", [{"W_BIT": 3}, {"FORMAT": "compressed-tensors", "VERSION": "GEMV"}])
def test_other_layouts_have_no_packing(section):
    assert packing_notes(config_of(llm={"AutoAWQ": section}), "cpu") == []


def test_a_format_string_has_to_name_a_column():
    with pytest.raises(ConfigErrors) as caught:
        config_of(FORMAT_STRING="the same for all")
    (error,) = caught.value.errors
    assert error.key == "FORMAT_STRING" and "write {text}" in error.detail
