"""Searching and looking at models through the real Hub client, from a server on loopback."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from backend.demo import MODEL_DIR
from backend.errors import ConfigError, ModelError
from backend.sources import hub, hub_cache, hub_token
from backend.sources.hub_errors import HubUnreachable
from backend.sources.models import model_facts
from tests.sources.hub_server import COMMIT, hubs

ABOUT = {
    "team/small": {
        "downloads": 1200, "likes": 7, "pipeline_tag": "text-generation", "lastModified": "2026-03-01T10:00:00.000Z",
        "tags": ["transformers", "license:apache-2.0"], "config": {"architectures": ["LlamaForCausalLM"]},
        "safetensors": {"parameters": {"BF16": 5}, "total": 5},
    },
    "team/small-awq": {
        "downloads": 90, "config": {"architectures": ["LlamaForCausalLM"], "quantization_config": {"bits": 4}},
    },
    "team/small-experts": {"downloads": 5000, "config": {"architectures": ["MixtralForCausalLM"],
                                                         "num_local_experts": 8}},
    "team/small-odd": {"config": "none", "tags": None, "downloads": "many", "likes": -4},
}  # fmt: skip


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


@pytest.fixture
def serve(monkeypatch):
    """Starts a Hub that everything asks from now on."""
    with pytest.MonkeyPatch.context() as patch, hubs(patch) as start:
        yield start


@pytest.fixture
def model(tmp_path):
    """A copy of the demo model, to be changed."""
    return shutil.copytree(MODEL_DIR, tmp_path / "model")


def changed(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))
    return folder


def keep(cache, name, folder):
    """Put a model into a cache as huggingface_hub lays them out."""
    entry = cache / f"models--{name.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    return shutil.copytree(folder, entry / "snapshots" / COMMIT)


def sharded(folder):
    """The model in three files and an index, without the single file."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    files = {name: f"model-{1 + i % 3:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: tensors[n] for n in names if files[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return folder


# -- search


def test_a_search_tells_what_the_hub_tells_and_what_cannot_be_quantized(home, serve, tmp_path):
    asked = serve(dict.fromkeys(ABOUT, tmp_path), about=ABOUT, gated=("team/small-closed",))
    found = {model.id: model for model in hub.search(home, "  SMALL ")}
    assert list(found)[:3] == ["team/small-experts", "team/small", "team/small-awq"]  # by downloads
    small = found["team/small"]
    assert (small.downloads, small.likes, small.licence, small.parameters) == (1200, 7, "apache-2.0", 5)
    assert (small.updated, small.kind, small.gated) == ("2026-03-01", "text-generation", False)
    assert small.architecture == "LlamaForCausalLM" and small.refused is None
    assert "quantized already" in found["team/small-awq"].refused
    assert "mixture of experts" in found["team/small-experts"].refused
    odd = found["team/small-odd"]
    assert (odd.downloads, odd.likes, odd.licence, odd.architecture, odd.refused) == (None,) * 5
    assert found["team/small-closed"].gated
    assert hub.search(home, "small") == list(found.values()) and asked == ["api/models"]  # kept for a while
    assert hub.search(home, "nothing-like-it") == []


@pytest.mark.parametrize("text", ["", "x", "<b>hi</b>", "../../etc/passwd", "modèle", "a\x00b", "x" * 101, "a?b=c"])
def test_what_is_in_no_models_name_is_not_asked_for(home, serve, text):
    asked = serve({})
    with pytest.raises(ConfigError, match="of a model's name"):
        hub.search(home, text)
    assert asked == []


@pytest.mark.parametrize(
    ("fault", "told"), [("api-429", "busy"), ("api-503", "is ill"), ("api-junk", "not one of the Hub"),
                        ("api-cut", "cannot be reached")]
)  # fmt: skip
def test_an_ill_hub_is_told_in_words_and_asked_again_later(home, serve, monkeypatch, tmp_path, fault, told):
    monkeypatch.setattr(hub, "FAILURE_KEPT_S", 0.0)
    serve({"team/small": tmp_path}, faults=[fault])
    with pytest.raises(HubUnreachable, match=told):
        hub.search(home, "small")
    assert [model.id for model in hub.search(home, "small")] == ["team/small"]


def test_a_token_without_the_right_to_read_is_told(home, serve, tmp_path):
    serve({"team/small": tmp_path}, faults=["api-403"])
    with pytest.raises(ModelError, match="forbids access .403.; the token may lack the right"):
        hub.inspect(home, "team/small")


def test_a_hub_that_never_answers_is_given_up(home, serve, monkeypatch):
    monkeypatch.setattr(hub, "SEARCH_LIMIT_S", 3.0)
    serve({}, faults=["api-hang"])
    with pytest.raises(HubUnreachable, match="did not answer within 3 s"):
        hub.search(home, "small")


def test_offline_says_what_still_works(home, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="refused.*built-in model, local folders and models in the cache"):
        hub.search(home, "small")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE is set"):
        hub.inspect(home, "team/small")


# -- inspect


@pytest.mark.parametrize("make", [lambda folder: folder, sharded], ids=["one file", "shards"])
def test_a_model_is_described_as_if_it_were_here_without_its_weights(home, serve, model, make):
    make(model)
    asked = serve({"team/small": model}, about=ABOUT)
    found = hub.inspect(home, "team/small", "v1.0")
    assert found.facts == model_facts(model) and found.commit == COMMIT
    assert found.model.refused is None and found.model.downloads == 1200
    weights = [path for path in asked if ".safetensors" in path and "index" not in path]
    sizes = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    read = [path.partition("#")[2].split("-") for path in weights if "#" in path]
    assert read and sum(int(last) - int(first) + 1 for first, last in read) < min(sizes, 400_000)
    assert not [p for p in asked if "tokenizer" in p] and all(COMMIT in p for p in asked if "/resolve/" in p)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: changed(m, quantization_config={"quant_method": "awq"}), "quantized already"),
        (lambda m: changed(m, num_hidden_layers=40), "config.json says 40"),
        (lambda m: changed(m, auto_map={"AutoModel": "modeling_x.Model"}), "auto_map"),
        (lambda m: changed(m, architectures="LlamaForCausalLM"), "a list is expected"),
        (lambda m: (m / "config.json").write_text("{"), "not readable JSON"),
        (lambda m: (m / "config.json").unlink(), "no config.json"),
        (lambda m: (m / "adapter_config.json").write_text("{}"), "adapter"),
        (lambda m: (m / "model.safetensors").rename(m / "pytorch_model.bin"), "only as pickle"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0[1,2]"), "broken"),
        (lambda m: (m / "model.safetensors").write_bytes(b"\xff" * 64), "broken"),
    ],
)
def test_why_a_model_cannot_be_quantized(home, serve, model, change, told):
    change(model)
    serve({"team/small": model})
    found = hub.inspect(home, "team/small")
    assert found.model.refused is not None
    with pytest.raises(ModelError, match=told):
        raise ModelError(found.model.refused)


def test_gated_models_open_with_the_right_token_and_closed_ones_say_what_to_do(home, serve, model):
    asked = serve({"team/closed": model}, gated=("team/closed",), token="hf_the_right_one_12345678")
    with pytest.raises(ModelError, match="gated: accept its licence on its Hub page, then enter a token"):
        hub.inspect(home, "team/closed")
    hub_token.save(home, "hf_a_wrong_one_12345678")
    with pytest.raises(ModelError, match="does not accept the token") as caught:
        hub.inspect(home, "team/closed")
    assert "hf_" not in caught.value.message
    hub_token.save(home, "hf_the_right_one_12345678")
    assert hub.inspect(home, "team/closed").facts == model_facts(MODEL_DIR)
    assert asked


def test_missing_models_and_revisions(home, serve, tmp_path):
    asked = serve({"team/small": tmp_path})
    with pytest.raises(ModelError, match="the Hub has no model team/absent, or it is private"):
        hub.inspect(home, "team/absent")
    with pytest.raises(ModelError, match="no branch, tag or commit 'v9'"):
        hub.inspect(home, "team/small", "v9")
    asked.clear()
    for name, revision in (("../x", None), ("a b", None), ("team/small", "../v"), ("team/small", "-v")):
        with pytest.raises(ConfigError):
            hub.inspect(home, name, revision)
    assert asked == []


def test_a_weight_file_that_breaks_off_is_told(home, serve, model):
    serve({"team/small": model}, faults=["cut", "cut", "cut", "cut", "cut", "cut"])
    with pytest.raises(ModelError):
        hub.inspect(home, "team/small")


# -- the cache


def test_whole_models_of_both_caches_are_listed(home, serve, model, monkeypatch):
    monkeypatch.setattr(hub_cache, "KEPT_S", 0.0)
    assert hub_cache.cached_models(home) == ()
    ours, shared = hub_cache.cache_folders(home)
    serve({"team/small": model, "team/other": model, "team/part": model})
    code = (
        "import sys; from huggingface_hub import snapshot_download as get\n"
        "get('team/small', cache_dir=sys.argv[1]); get('team/small', revision=sys.argv[3], cache_dir=sys.argv[2])\n"
        "get('team/other', revision=sys.argv[3], cache_dir=sys.argv[2])\n"
        "get('team/part', allow_patterns='*.json', cache_dir=sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, ours, shared, COMMIT], env=os.environ, check=True, capture_output=True)
    other, small = hub_cache.cached_models(home)
    assert (small.id, small.ours, small.is_main, small.commit) == ("team/small", True, True, COMMIT)
    assert (other.id, other.ours, other.is_main) == ("team/other", False, False)
    assert small.bytes == sum(path.stat().st_size for path in model.iterdir())
    assert hub_cache.find_cached(home, "team/small", None) == small
    assert hub_cache.find_cached(home, "team/other", None) is None
    assert hub_cache.find_cached(home, "team/other", COMMIT) == other
    assert hub_cache.find_cached(home, "team/part", COMMIT) is None
    assert small.refused is None and abs(small.used - time.time()) < 3600
    part = hub_cache.inventory(home).models[1]
    assert (part.id, part.whole) == ("team/part", False) and "must hold model.safetensors" in part.refused
    assert model_facts(small.folder) == model_facts(MODEL_DIR)


def test_the_inventory_says_why_a_copy_cannot_be_used_and_nothing_of_where_it_lies(home, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_cache, "KEPT_S", 0.0)
    own = home.root / "own" / "hub"
    keep(own, "team/whole", MODEL_DIR)
    keep(own, "team/awq", changed(shutil.copytree(MODEL_DIR, tmp_path / "a"), quantization_config={"bits": 4}))
    short = keep(own, "team/short", MODEL_DIR) / "model.safetensors"
    data = short.read_bytes()
    short.unlink()
    short.write_bytes(data[:4000])
    (own / "models--team--gone" / "refs").mkdir(parents=True)
    assert hub_cache.inventory(home).models == ()
    found = hub_cache.inventory(home, "own")
    told = {model.id: model.refused for model in found.models}
    assert told["team/whole"] is None and "quantized already" in told["team/awq"]
    assert "not whole: model.safetensors is not a usable safetensors file: it is truncated" in told["team/short"]
    assert found.damaged == ("team/gone",) and str(home.root) not in str(told)
    assert hub_cache.inventory(home, "../../etc").models == ()
    assert hub_cache.snapshot(own, "team/whole", None) == hub_cache.find_cached(home, "team/whole", None, "own").folder
    assert hub_cache.snapshot(own, "team/whole", COMMIT) and not hub_cache.snapshot(own, "team/gone", None)
