"""Weights stored as pickles: refused, and where the operator allows them converted without running anything.

The payloads are real: each would leave a canary file behind if anything opened it carelessly.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from backend.errors import CheckpointError, ConfigErrors, ModelError
from backend.evaluate.loading import open_model
from backend.formats.headers import SINGLE_FILE, read_headers
from backend.formats.loader import load_model
from backend.jobs.preflight import check_job
from backend.paths import Home
from backend.sources import pickles
from backend.sources.pickles import convert
from backend.sources.prepare import prepare
from backend.sources.quick_check import quick_check
from tests.conftest import demo_text
from tests.security.folders import NATIVE, allow, change, job, quiet


class Payload:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def as_pickle(folder: Path, name: str = "pytorch_model.bin") -> dict[str, torch.Tensor]:
    """Turn a model's safetensors into an honest pickle."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    torch.save(tensors, folder / name)
    return tensors


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.PKL", "w.npy"])
def test_a_pickle_is_refused_and_never_opened(home: Home, model: Path, canary: Path, name: str) -> None:
    (model / SINGLE_FILE).unlink()
    (model / name).write_bytes(pickle.dumps(Payload(canary)))
    for load in (read_headers, quick_check, load_model, open_model):
        with pytest.raises(CheckpointError, match="only as pickle"):
            load(model)
    with pytest.raises(ConfigErrors, match="only as pickle"):
        check_job(job(model, **NATIVE), home)
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    with pytest.raises(CheckpointError, match="only as pickle"):
        prepare({**request, "out": str(home.root / "out")}, quiet())
    assert not canary.exists()


def test_the_payload_of_the_tests_works(tmp_path: Path, canary: Path) -> None:
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


def test_pickles_beside_safetensors_are_left_alone(home: Home, model: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Payload(canary)))
    allow(home)
    check_job(job(model, **NATIVE), home)
    open_model(model)
    assert not canary.exists()


def test_where_allowed_an_honest_pickle_becomes_safetensors(home: Home, model: Path) -> None:
    tensors = as_pickle(model)
    allow(home)
    checked = check_job(job(model, **NATIVE), home)
    assert any("converts them first" in note for note in checked.notes)
    assert checked.predicted == {}
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    result = prepare({**request, "out": str(home.root / "out")}, quiet())
    converted = Path(result["model_dir"])
    assert converted == home.root / "out" / "model"
    found = load_file(converted / SINGLE_FILE)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not [path for path in converted.iterdir() if path.suffix == ".bin"]
    open_model(converted)
    prepare({**request, "out": str(home.root / "out")}, quiet())  # a second attempt starts afresh


def test_shards_and_old_checkpoints_are_converted(model: Path, tmp_path: Path) -> None:
    tensors = as_pickle(model, "x.ckpt")
    torch.save({"state_dict": tensors, "epoch": 3}, model / "x.ckpt")
    (model / "optimizer.pt").write_bytes(b"not a pickle, and not read")
    converted_here(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / SINGLE_FILE).keys() == tensors.keys()

    (model / "x.ckpt").unlink()
    names = sorted(tensors)
    half = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(half.values()):
        torch.save({name: tensors[name] for name in names if half[name] == file}, model / file)
    (model / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": half}))
    converted = convert(model, tmp_path / "b", tmp_path)
    assert {info.name for info in read_headers(converted)} == set(names)
    open_model(converted)

    (model / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": {"a": "../../x.bin"}}))
    with pytest.raises(CheckpointError, match="no file of that folder"):
        converted_here(model, tmp_path / "c")


def converted_here(model: Path, out: Path) -> None:
    """What the process of its own does, in this one: starting one takes seconds."""
    shutil.rmtree(out, ignore_errors=True)
    pickles.unpickle({"folder": str(model), "out": str(out)}, quiet())


def refused_content(model: Path, tmp_path: Path, content: Any, says: str) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    torch.save(content, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says) as caught:
        converted_here(model, tmp_path / "out")
    assert "pytorch_model.bin" in caught.value.message


def test_where_allowed_a_payload_still_does_not_run(home: Home, model: Path, tmp_path: Path, canary: Path) -> None:
    allow(home)
    refused_content(model, tmp_path, Payload(canary), "is refused")
    refused_content(model, tmp_path, {"a": torch.ones(2), "b": Payload(canary)}, "is refused")
    refused_content(model, tmp_path, {"state_dict": {"a": Payload(canary)}}, "is refused")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match="is refused"):
        convert(model, tmp_path / "out", tmp_path)
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    with pytest.raises(CheckpointError, match="is refused"):
        prepare({**request, "out": str(home.root / "out")}, quiet())
    assert not canary.exists()


def test_where_allowed_only_plain_tensors_are_taken(model: Path, tmp_path: Path) -> None:
    refused_content(model, tmp_path, [torch.ones(2)], "table of tensors")
    refused_content(model, tmp_path, {}, "table of tensors")
    refused_content(model, tmp_path, {"a": 3}, "no plain tensor")
    refused_content(model, tmp_path, {3: torch.ones(2)}, "no plain tensor")
    refused_content(model, tmp_path, {"a": torch.eye(3).to_sparse()}, "no plain tensor")
    huge = torch.ones(1).expand(2**40)
    refused_content(model, tmp_path, {"a": huge}, "more data than the file holds")
    one = torch.ones(10_000)
    refused_content(model, tmp_path, {str(i): one for i in range(9)}, "more data than the file holds")
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match="is refused: it is broken"):
        converted_here(model, tmp_path / "out")
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("../../evil", "x")
    with pytest.raises(CheckpointError, match="is refused"):
        converted_here(model, tmp_path / "out")


def test_where_allowed_code_hooks_are_refused_all_the_same(home: Home, model: Path, tmp_path: Path) -> None:
    as_pickle(model)
    change(model / "config.json", auto_map={"AutoConfig": "evil.Config"})
    allow(home)
    with pytest.raises(ConfigErrors, match="auto_map"):
        check_job(job(model, **NATIVE), home)
    with pytest.raises(ModelError, match="auto_map"):
        convert(model, tmp_path / "out", tmp_path)


def test_the_converting_process_sees_no_secrets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickle(model)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "evil"))
    seen: list[dict[str, str]] = []
    real = subprocess.run
    monkeypatch.setattr(
        pickles.subprocess, "run", lambda *a, **k: seen.append(k["env"]) or real(*a, **k)  # type: ignore[func-returns-value]
    )  # fmt: skip
    convert(model, tmp_path / "out", tmp_path)
    assert len(seen) == 1
    assert not {"HF_TOKEN", "PYTHONPATH", "LD_PRELOAD"} & seen[0].keys()
