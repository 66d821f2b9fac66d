"""What is known of a Hub model before it is downloaded: the same as of one that is here, from its headers alone."""

import pytest

from backend import cli
from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors
from backend.jobs.preflight import check_job
from backend.schema import parse_yaml
from backend.sources import hub
from tests.conftest import demo_text
from tests.jobs.test_preflight import copy_model, narrow_model, native
from tests.sources.hub_server import COMMIT, hub_server
from tests.sources.test_hub import keep


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))


def config_of(**changes):
    return parse_yaml(demo_text(**{"MODEL": "team/model", **changes})).config


def looked_at(home, monkeypatch, folder, revision=None, **options):
    """The Hub has the folder as team/model, and was asked about it."""
    with hub_server({"team/model": folder}, **options) as (endpoint, asked):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        hub.inspect(home, "team/model", revision)
        asked.clear()
        yield asked


@pytest.fixture
def inspected(home, monkeypatch):
    running = []

    def start(folder, **options):
        running.append(looked_at(home, monkeypatch, folder, **options))
        return next(running[-1])

    yield start
    for one in running:
        next(one, None)


ALGORITHMS = {
    "AutoAWQ": {},
    "Native": native(METHOD=["GPTQ", "AWQ+GPTQ"], W_BIT=[4, 3]),
    "AQLM": {"ALGORITHM": "AQLM", "llm": {"AQLM": {"calibration_config": {
        "num_codebooks": 2, "nbits_per_codebook": 8, "val_size": 2}, "finetune_config": {"max_epochs": 0}}}},
    "TensorRTLLM": {"ALGORITHM": "TensorRTLLM", "llm": {"TensorRTLLM": {"quant_method": ["int8", "fp8"]}}},
    "LLMCompressor": {"ALGORITHM": "LLMCompressor", "llm": {"LLMCompressor": {"RECIPE": "GPTQ"}}},
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_size_and_bits_are_those_of_the_same_model_here(home, inspected, algorithm):
    asked = inspected(MODEL_DIR)
    changes = ALGORITHMS[algorithm]
    there, here = check_job(config_of(**changes), home), check_job(config_of(MODEL=str(MODEL_DIR), **changes), home)
    assert there.predicted == here.predicted != {} and there.bits == here.bits
    assert there.known.facts == here.known.facts and there.known.folder is None
    assert there.room.results == here.room.results and here.room.download == 0
    wanted = [p for p in MODEL_DIR.iterdir() if p.suffix in (".json", ".safetensors", ".jinja", ".model", ".txt")]
    assert there.room.download == there.known.download_bytes == sum(p.stat().st_size for p in wanted)
    assert f"headers at commit {COMMIT[:12]}, nothing downloaded" in there.known.basis
    assert asked == []  # checks ask nobody
    assert not list(home.root.rglob("*.safetensors"))


def test_what_does_not_go_with_the_model_is_told_before_the_download(home, inspected, tmp_path):
    inspected(narrow_model(tmp_path / "m"))
    with pytest.raises(ConfigErrors, match="use 32 to fit all of them") as caught:
        check_job(config_of(), home)
    assert [e.key for e in caught.value.errors] == ["llm.AutoAWQ.Q_GROUP_SIZE"]


def test_a_model_that_cannot_be_quantized_is_refused_before_the_download(home, inspected, tmp_path):
    inspected(copy_model(tmp_path / "m", num_local_experts=8))
    with pytest.raises(ConfigErrors, match="mixture of experts") as caught:
        check_job(config_of(), home)
    assert [e.key for e in caught.value.errors] == ["MODEL"]


@pytest.mark.parametrize("setting", ["[models]\nallow_pickle = true", ""])
def test_pickles_are_refused_or_converted_later(home, inspected, tmp_path, setting):
    model = copy_model(tmp_path / "m")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    inspected(model)
    home.root.mkdir()
    (home.root / "quantdeck.toml").write_text(setting)
    if not setting:
        with pytest.raises(ConfigErrors, match="only as pickle"):
            check_job(config_of(), home)
        return
    checked = check_job(config_of(), home)
    assert checked.predicted == {} and any("converts them first" in note for note in checked.notes)


def test_a_disk_without_room_for_the_download_is_told(home, inspected, monkeypatch):
    inspected(MODEL_DIR)
    monkeypatch.setattr("backend.jobs.room.free_bytes", lambda path: 20_000_000)
    with pytest.raises(ConfigErrors, match="download has 12.7 MB, its result needs up to .* free some space"):
        check_job(config_of(), home)
    assert check_job(config_of(MODEL="quantdeck/demo"), home).room.download == 0  # which fits
    monkeypatch.setattr("backend.jobs.room._device", lambda folder: str(folder))  # the cache has a disk of its own
    with pytest.raises(ConfigErrors, match="the model's download has .* and the disk of"):
        monkeypatch.setattr("backend.jobs.room.free_bytes", lambda path: 1000 if ".cache" in str(path) else 10**12)
        check_job(config_of(), home)


def test_without_a_look_it_is_known_after_the_download(home):
    checked = check_job(config_of(), home)
    assert checked.predicted == {} and checked.room is None and checked.known.facts is None
    assert any("downloaded when the job starts" in note for note in checked.notes)


def test_a_copy_in_a_cache_tells_as_much(home, monkeypatch, tmp_path):
    keep(home.user_data / ".cache" / "hub", "team/model", MODEL_DIR)
    keep(tmp_path / "hf" / "hub", "team/shared", MODEL_DIR)
    for name in ("team/model", "team/shared"):
        checked = check_job(config_of(MODEL=name), home)
        assert checked.predicted == check_job(config_of(MODEL="quantdeck/demo"), home).predicted
        assert "its copy in the cache" in checked.known.basis and checked.room.download == 0
    assert check_job(config_of(REVISION=COMMIT), home).known.folder.name == COMMIT
    assert check_job(config_of(REVISION="v1.0"), home).known.facts is None
    elsewhere = keep(home.root / "here" / "hub", "team/own", MODEL_DIR)
    assert check_job(config_of(MODEL="team/own", CACHE_PATH="here"), home).known.folder == elsewhere
    assert check_job(config_of(MODEL="team/own"), home).known.facts is None
    weights = elsewhere / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])  # cut since
    assert check_job(config_of(MODEL="team/own", CACHE_PATH="here"), home).known.facts is None


def test_a_downloaded_commit_is_not_downloaded_again(home, inspected, tmp_path):
    keep(home.user_data / ".cache" / "hub", "team/model", MODEL_DIR)
    inspected(MODEL_DIR)
    checked = check_job(config_of(), home)
    assert checked.room.download == 0 and "nothing is downloaded again" in checked.known.basis


def test_the_command_asks_the_hub_only_when_told_to(home, inspected, tmp_path, capsys):
    asked = inspected(MODEL_DIR)
    job = tmp_path / "job.yaml"
    job.write_text(demo_text(MODEL="team/model", REVISION="v1.0"))
    command = ["validate", str(job), "--home", str(home.root)]
    assert cli.main(command) == 0 and asked == []
    assert "MB of weights" not in capsys.readouterr().out
    assert cli.main([*command, "--online"]) == 0 and asked
    told = capsys.readouterr().out
    assert "MB of weights" in told and "nothing downloaded" in told and "12.7 MB of download and up to" in told


def test_own_code_waits_for_the_download(home, inspected, tmp_path):
    model = copy_model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    inspected(model)
    home.root.mkdir()
    (home.root / "quantdeck.toml").write_text("[models]\nallow_remote_code = true")
    with pytest.raises(ConfigErrors, match="auto_map"):
        check_job(config_of(), home)
    trusted = check_job(config_of(**native(METHOD="RTN"), TRUST_REMOTE_CODE=True), home)
    assert trusted.known.facts is None and trusted.predicted == {}
