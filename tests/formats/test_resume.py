"""A killed writer goes on to the same bytes; a full disk stops it without leaving anything that looks finished."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from backend.errors import CheckpointError
from backend.formats.writer import CheckpointWriter
from tests.formats.crash import digest
from tests.formats.models import make_model, random_weight


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), num_hidden_layers=1)


@pytest.mark.parametrize(("layout", "stride"), [("compressed-tensors", 7), ("autoawq-gemm", 23), ("aqlm", 11)])
def test_killed_anywhere(tmp_path: Path, source: Path, layout: str, stride: int) -> None:
    command = [sys.executable, "-m", "tests.formats.crash", str(source), str(tmp_path), layout, str(stride)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["different"] == []
    assert result["points"] > 60
    assert result["kills"] > result["points"] // stride
    assert [name for name in result["files"] if name.startswith("model")] == [
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]


def writer(out: Path, source: Path, **options: Any) -> CheckpointWriter:
    return CheckpointWriter(out, source, **{"layout": "compressed-tensors", "max_shard_bytes": 5000} | options)


def layer(target: CheckpointWriter, index: int) -> None:
    target.add(f"model.layers.{index}.norm.weight", torch.full((1000,), float(index)))
    target.add_linear(f"model.layers.{index}.fc", random_weight(16, 96, 32))


def test_full_shards_are_assembled_by_seal_alone(tmp_path: Path, source: Path) -> None:
    target = writer(tmp_path / "out", source)
    for index in range(4):
        layer(target, index)
    parts = {f"shard-0000{n}.part" for n in (1, 2, 3)}
    assert set(digest(tmp_path / "out")) == parts
    target.seal()  # nothing was committed yet
    target.commit()
    assert set(digest(tmp_path / "out")) == parts
    target.seal()
    assert set(digest(tmp_path / "out")) == {"shard-00001.safetensors", "shard-00002.safetensors", "shard-00003.part"}


def test_a_fresh_writer_clears_what_an_unrelated_run_left(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("mine")
    for count in (3, 1):
        target = writer(tmp_path / "out", source)
        for index in range(count):
            layer(target, index)
        target.finish({})
    names = set(digest(tmp_path / "out"))
    assert names == {"config.json", "generation_config.json", "model.safetensors", "note.txt"}


def test_states_that_do_not_fit(tmp_path: Path, source: Path) -> None:
    target = writer(tmp_path / "out", source)
    for index in range(3):
        layer(target, index)
    state = target.commit()
    with pytest.raises(CheckpointError, match="begun with dtype 'float16' and cannot be continued with 'bfloat16'"):
        writer(tmp_path / "out", source, dtype="bfloat16").restore(state)
    (tmp_path / "out" / "shard-00002.part").unlink()
    with pytest.raises(CheckpointError, match=r"bytes of shard 2 .* not there any more.*start again"):
        writer(tmp_path / "out", source).restore(state)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    """Writing beyond this fails as it does on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_disk_full_while_tensors_come(tmp_path: Path, source: Path) -> None:
    whole = writer(tmp_path / "whole", source)
    for index in range(4):
        layer(whole, index)
    whole.finish({})
    target = writer(tmp_path / "out", source)
    layer(target, 0)
    layer(target, 1)
    state = json.loads(json.dumps(target.commit()))
    target.seal()
    with file_size_limit(1000), pytest.raises(CheckpointError, match=r"shard-0000\d.part.*MiB.*free.*resume") as error:
        layer(target, 2)
    assert isinstance(error.value.__cause__, OSError)
    assert not list((tmp_path / "out").glob("*.tmp"))
    assert not (tmp_path / "out" / "config.json").exists()
    again = writer(tmp_path / "out", source)
    again.restore(state)
    layer(again, 2)
    layer(again, 3)
    again.finish({})
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_the_same_writer_goes_on_when_there_is_space_again(tmp_path: Path, source: Path) -> None:
    target = writer(tmp_path / "out", source)
    layer(target, 0)
    with file_size_limit(3500), pytest.raises(CheckpointError, match="File too large"):
        target.add("model.layers.1.norm.weight", torch.full((1000,), 1.0))  # a part of it is written
    layer(target, 1)
    whole = writer(tmp_path / "whole", source)
    layer(whole, 0)
    layer(whole, 1)
    target.finish({})
    whole.finish({})
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.parametrize("limit", [100, 3000, 4500])
def test_disk_full_while_finishing(tmp_path: Path, source: Path, limit: int) -> None:
    """At different sizes different files are the first that does not fit."""
    target = writer(tmp_path / "out", source)
    for index in range(3):
        layer(target, index)
    state = json.loads(json.dumps(target.commit()))
    with file_size_limit(limit), pytest.raises(CheckpointError, match=r"could not be written \(File too large.*Free"):
        target.finish({})
    assert not (tmp_path / "out" / "config.json").exists()
    again = writer(tmp_path / "out", source)
    again.restore(state)
    again.finish({})
    whole = writer(tmp_path / "whole", source)
    for index in range(3):
        layer(whole, index)
    whole.finish({})
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_disk_full_at_config_json(tmp_path: Path, source: Path) -> None:
    (source / "generation_config.json").unlink(missing_ok=True)
    target = writer(tmp_path / "out", source)
    target.add("a", torch.ones(2))
    with file_size_limit(300), pytest.raises(CheckpointError, match="config.json could not be written"):
        target.finish({})
    assert not (tmp_path / "out" / "config.json").exists()
