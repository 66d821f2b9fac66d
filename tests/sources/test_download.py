"""Downloads through the real Hub client, from a server on loopback."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backend.demo import MODEL_DIR
from backend.paths import PROJECT
from tests.sources.hub_server import COMMIT, hub_server

CODE = """
import sys
from pathlib import Path
from backend.errors import QuantdeckError
from backend.sources.prepare import download_model
try:
    print(*download_model(sys.argv[1], Path(sys.argv[2]), sys.argv[3] or None), sep="\\n")
except QuantdeckError as error:
    print("refused:", error.message)
"""


def download(endpoint, repo, cache, revision=""):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(cache / "hf"), "HF_HUB_DISABLE_XET": "1"}
    finished = subprocess.run(
        [sys.executable, "-c", CODE, repo, str(cache / "hub"), revision],
        cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip().splitlines()


@pytest.fixture
def repo(tmp_path):
    folder = tmp_path / "repo"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def test_a_model_comes_without_pickles_and_code_and_with_its_commit(repo, tmp_path):
    with hub_server({"team/small": repo}) as (endpoint, asked):
        folder, commit = download(endpoint, "team/small", tmp_path)
        assert commit == COMMIT
        assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
        assert not [path for path in asked if path.endswith((".bin", ".py"))]


def test_a_model_that_is_there_is_not_fetched_again(repo, tmp_path):
    with hub_server({"team/small": repo}) as (endpoint, asked):
        first = download(endpoint, "team/small", tmp_path)
        asked.clear()
        assert download(endpoint, "team/small", tmp_path) == first
        assert not [path for path in asked if path.endswith("model.safetensors")]


def test_missing_and_gated_models_say_what_to_do(repo, tmp_path):
    with hub_server({}, gated=("team/gated",)) as (endpoint, _):
        assert "the Hub has no model team/absent" in download(endpoint, "team/absent", tmp_path)[0]
        assert "team/gated is gated: accept its licence" in download(endpoint, "team/gated", tmp_path)[0]


def test_a_file_that_was_spoilt_on_the_disk_is_fetched_again(repo, tmp_path):
    with hub_server({"team/small": repo}) as (endpoint, asked):
        folder, _ = download(endpoint, "team/small", tmp_path)
        blob = Path(folder, "model.safetensors").resolve()
        blob.write_bytes(b"WEIGHTS")  # of the same size, so that only its checksum tells
        asked.clear()
        assert download(endpoint, "team/small", tmp_path)[0] == folder
        assert Path(folder, "model.safetensors").read_bytes() == b"weights"
        assert [path for path in asked if path.endswith("model.safetensors")]


@pytest.mark.parametrize("faults", [["cut"], ["503", "429"], ["wrong"], ["cut", "wrong"]])
def test_what_goes_wrong_once_on_the_way_is_mended(repo, tmp_path, faults):
    left = list(faults)
    with hub_server({"team/small": repo}, faults=left) as (endpoint, _):
        folder, *_rest = download(endpoint, "team/small", tmp_path)
        assert Path(folder, "model.safetensors").read_bytes() == b"weights", folder
    assert left == []


def test_a_file_that_is_never_what_it_should_be_is_not_used(repo, tmp_path):
    with hub_server({"team/small": repo}, faults=["wrong"] * 20) as (endpoint, _):
        (message,) = download(endpoint, "team/small", tmp_path)
    assert "model.safetensors of team/small was downloaded twice" in message


def test_without_network_it_says_so(tmp_path):
    assert "the Hub cannot be reached" in download("http://127.0.0.1:9", "team/small", tmp_path)[0]


def test_a_revision_is_asked_for_and_a_wrong_one_is_named(repo, tmp_path):
    with hub_server({"team/small": repo}) as (endpoint, asked):
        assert download(endpoint, "team/small", tmp_path, revision="v1.0")[1] == COMMIT
        assert "api/models/team/small/revision/v1.0" in asked
        assert f"team/small/resolve/{COMMIT}/model.safetensors" in asked
        told = download(endpoint, "team/small", tmp_path, revision="absent")[0]
        assert "team/small has no branch, tag or commit 'absent'" in told


def test_without_network_a_model_comes_from_either_cache(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(MODEL_DIR, model)
    ours, users = tmp_path / "ours", tmp_path / "users"
    for cache in (ours, users):
        cache.mkdir()
    with hub_server({"team/small": model}) as (endpoint, _):
        first = download(endpoint, "team/small", ours)
        # what another program of this user fetched into the cache of huggingface_hub
        code = "import sys; from huggingface_hub import snapshot_download; snapshot_download(sys.argv[1])"
        environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(users / "hf"), "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-c", code, "team/small"], env=environment, check=True, capture_output=True)
    assert download("http://127.0.0.1:9", "team/small", ours) == first
    folder, commit = download("http://127.0.0.1:9", "team/small", users)
    assert commit == COMMIT and Path(folder).is_relative_to(users / "hf")
    Path(folder, "model.safetensors").resolve().write_bytes(b"spoilt")
    assert "the Hub cannot be reached" in download("http://127.0.0.1:9", "team/small", users)[0]
