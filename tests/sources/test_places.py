"""Local paths of a job: what the web page may name, and what nobody may."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from backend.errors import ConfigError, ConfigErrors
from backend.jobs.preflight import check_job
from backend.paths import Home
from backend.schema import parse_yaml
from backend.settings import FILE_NAME
from backend.sources import places
from backend.sources.models import is_repo_id, list_models, resolve_model
from backend.sources.places import check_outputs
from backend.sources.plan import calibration_source, evaluation_source
from tests.conftest import demo_text, write_jsonl


def job(**changes: object):  # noqa: ANN201
    return parse_yaml(demo_text(**changes)).config


@pytest.fixture
def models(home: Home) -> Path:
    """The folder of models of a home, with one that only has a config.json."""
    folder = home.user_data / "models"
    (folder / "tiny").mkdir(parents=True)
    (folder / "tiny" / "config.json").write_text("{}")
    return folder


def refused(home: Home, name: str, key: str = "CUSTOM_MODEL_PATH", *, confined: bool = True) -> str:
    with pytest.raises(ConfigErrors) as caught:
        resolve_model(job(**{key: name}), home, confined=confined)
    assert caught.value.errors[0].key == key
    return caught.value.message


def test_the_page_opens_what_lies_in_its_roots(home: Home, models: Path, tmp_path: Path) -> None:
    for name in ("user_data/models/tiny", str(models / "tiny"), f"{models}/./tiny/"):
        found = resolve_model(job(CUSTOM_MODEL_PATH=name), home, confined=True)
        assert found.path == models / "tiny"
    shared = tmp_path / "shared"
    (shared / "big").mkdir(parents=True)
    assert "only what lies inside" in refused(home, str(shared / "big"))
    (home.root / FILE_NAME).write_text(f'[models]\nroots = ["{shared}"]\n')
    assert resolve_model(job(CUSTOM_MODEL_PATH=str(shared / "big")), home, confined=True).path == shared / "big"


@pytest.mark.parametrize(
    "name",
    [
        "/etc", "/", "/proc/self", "/proc/self/root", "/dev/zero", "/sys", "~", "~root", "~nobody-of-that-name/x",
        "user_data/models/../../..", "..", "../..", "user_data", ".", "user_data/models/tiny/../../jobs",
        "user_data/models/%2e%2e/%2e%2e", "user_data/models/\u2025/x", "a\u0000b", "x\ny", "/" + "a" * 5000,
        "user_data/models/absent", "file:///etc", "http://169.254.169.254/latest", "-rf", "--config=x",
    ],
)  # fmt: skip
def test_the_page_gets_nowhere_else(home: Home, models: Path, name: str) -> None:
    before = sorted(home.root.rglob("*"))
    refused(home, name)
    assert sorted(home.root.rglob("*")) == before


def test_the_page_cannot_tell_what_exists_elsewhere(home: Home, models: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    there, absent = refused(home, str(tmp_path / "there")), refused(home, str(tmp_path / "gone"))
    assert there.replace("there", "gone") == absent


@pytest.mark.parametrize(
    "name",
    ["a;touch x", "$(id)", "`id`", "a b", "x\n", "org/name\n", "../x", "org/..", "a/b/c", "org--x/y", "-x/y", "é/x",
     "http://host/x", "file:///etc/passwd", "hf://x/y", "org/name@main:x", "a" * 200, "https://evil.example"],
)  # fmt: skip
def test_a_name_that_is_no_hub_id_is_refused(home: Home, name: str) -> None:
    assert not is_repo_id(name)
    with pytest.raises(ConfigErrors):
        resolve_model(job(MODEL=name), home, confined=True)


def test_links_that_lead_out_are_refused(home: Home, models: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("{}")
    (models / "linked").symlink_to(secret)
    assert "only what lies inside" in refused(home, "user_data/models/linked")

    (models / "tiny" / "model.safetensors").symlink_to("/etc/passwd")
    assert "model.safetensors is a link that leads outside" in refused(home, "user_data/models/tiny")
    (models / "tiny" / "model.safetensors").unlink()

    (models / "tiny" / "deep").mkdir()
    (models / "tiny" / "deep" / "x").symlink_to(secret)
    assert "deep/x is a link that leads outside" in refused(home, "user_data/models/tiny")
    (models / "tiny" / "deep" / "x").unlink()

    (models / "tiny" / "gone").symlink_to(models / "nothing")
    assert "link to nothing" in refused(home, "user_data/models/tiny")
    (models / "tiny" / "gone").unlink()

    (models / "tiny" / "loop").symlink_to("loop")
    assert "link to nothing" in refused(home, "user_data/models/tiny")
    (models / "tiny" / "loop").unlink()
    (models / "around").symlink_to("around")
    refused(home, "user_data/models/around")

    (models / "tiny" / "inside").symlink_to(models / "tiny" / "config.json")  # as the Hub's own cache does
    assert resolve_model(job(CUSTOM_MODEL_PATH="user_data/models/tiny"), home, confined=True).path


def test_pipes_sockets_and_devices_are_refused(home: Home, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models / "tiny"
    os.mkfifo(folder / "pipe")
    assert "pipe is a pipe, socket or device" in refused(home, "user_data/models/tiny")
    (folder / "pipe").unlink()
    monkeypatch.chdir(folder)  # the name of a socket is short
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        assert "s is a pipe, socket or device" in refused(home, "user_data/models/tiny")
    (folder / "s").unlink()
    os.mkfifo(models / "only")
    assert "pipe, socket or device" in refused(home, "user_data/models/only", confined=False)


def test_a_folder_of_too_many_files_is_refused(home: Home, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "MAX_FILES", 5)
    for number in range(6):
        (models / "tiny" / str(number)).touch()
    assert "more than 5 files" in refused(home, "user_data/models/tiny")


@pytest.mark.parametrize("name", ["/proc/self", "/dev", "/dev/fd", "/sys/kernel", "~nobody-of-that-name", "x\0y"])
def test_system_files_are_refused_to_everybody(home: Home, name: str) -> None:
    refused(home, name, confined=False)


def test_the_command_line_may_use_any_folder(home: Home, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    found = resolve_model(job(CUSTOM_MODEL_PATH=str(tmp_path / "link")), home)
    assert found.path == tmp_path / "elsewhere"


def test_data_is_confined_as_models_are(home: Home, models: Path, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "out.jsonl", [{"text": "x"}])
    assert calibration_source(job(DATA_PATH=str(tmp_path / "out.jsonl")), home).path == tmp_path / "out.jsonl"
    for name in (str(tmp_path / "out.jsonl"), "/etc/passwd", "jobs.db", "~/x", "../x"):
        with pytest.raises(ConfigErrors) as caught:
            calibration_source(job(DATA_PATH=name), home, confined=True)
        assert caught.value.errors[0].key == "DATA_PATH"
    (models / "text.jsonl").symlink_to(tmp_path / "out.jsonl")
    with pytest.raises(ConfigErrors, match="only what lies inside"):
        calibration_source(job(DATA_PATH="user_data/models/text.jsonl"), home, confined=True)
    write_jsonl(models / "own.jsonl", [{"text": "x"}])
    found = calibration_source(job(DATA_PATH="user_data/models/own.jsonl"), home, confined=True)
    assert found.path == models / "own.jsonl"
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ConfigErrors, match="pipe"):
        calibration_source(job(DATA_PATH=str(tmp_path / "pipe.jsonl")), home)


@pytest.mark.parametrize(
    "name", ["/etc", "./data", "json", "text", "pandas", "csv", "http://169.254.169.254/", "file:///etc", "examples",
             "backend/demo", "a/b/c", "org/name\n", "org/data.py;x"],
)  # fmt: skip
def test_a_dataset_name_is_never_a_path_an_address_or_a_reader(
    home: Home, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    with pytest.raises(ConfigErrors) as caught:
        calibration_source(job(DATASET_NAME=name), home)
    assert caught.value.errors[0].key == "DATASET_NAME"
    with pytest.raises(ConfigErrors) as caught:
        evaluation_source(job(EVALUATION={"DATASET_NAME": name}))
    assert caught.value.errors[0].key == "EVALUATION.DATASET_NAME"
    with pytest.raises(ConfigErrors) as caught:
        check_job(job(EVALUATION={"DATASET_NAME": name}), home)
    assert "EVALUATION.DATASET_NAME" in [error.key for error in caught.value.errors]


@pytest.mark.parametrize("template", ["{text:>1000000000}", "{text!r}", "{text:{text}}"])
def test_a_format_string_cannot_make_rows_longer(home: Home, template: str) -> None:
    with pytest.raises(ConfigError, match="FORMAT_STRING"):
        calibration_source(job(FORMAT_STRING=template), home)
    assert calibration_source(job(FORMAT_STRING="<{text}>"), home).template == "<{text}>"


@pytest.mark.parametrize(
    ("changes", "link", "key"),
    [
        ({}, "user_data", "USER_FOLDER"),
        ({"USER_FOLDER": "mine"}, "mine", "USER_FOLDER"),
        ({}, "user_data/jobs", "USER_FOLDER"),
        ({}, "user_data/jobs/Kompress/demo", "USER_FOLDER"),
        ({}, "user_data/logs/demo", "USER_FOLDER"),
        ({"LOGGING_PATH": "logs"}, "logs", "LOGGING_PATH"),
        ({"CACHE_PATH": "cache"}, "cache", "CACHE_PATH"),
    ],
)
def test_output_folders_do_not_lead_out_of_the_home(
    home: Home, tmp_path: Path, changes: dict[str, object], link: str, key: str
) -> None:
    target = tmp_path / "etc"
    target.mkdir()
    place = home.root / link
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(target)
    config = job(**changes)
    for check in (lambda: check_outputs(config, home), lambda: check_job(config, home)):
        with pytest.raises(ConfigErrors, match="leads out of the home folder") as caught:
            check()
        assert key in [error.key for error in caught.value.errors]
    assert list(target.iterdir()) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("USER_FOLDER", "user_data/.quantdeck"),
        ("LOGGING_PATH", "user_data/.quantdeck/runs/01ABC"),
        ("LOGGING_PATH", "user_data/jobs/Kompress/other"),
        ("CACHE_PATH", "user_data/jobs"),
        ("CACHE_PATH", "user_data/.quantdeck"),
    ],
)
def test_a_job_does_not_write_among_the_files_of_others(home: Home, key: str, value: str) -> None:
    with pytest.raises(ConfigErrors, match="keeps its own files") as caught:
        check_outputs(job(**{key: value}), home)
    assert [error.key for error in caught.value.errors][-1] == key


def test_a_log_that_is_a_pipe_or_a_link_is_refused(home: Home, tmp_path: Path) -> None:
    folder = home.user_data / "logs" / "demo"
    folder.mkdir(parents=True)
    os.mkfifo(folder / "log.log")
    with pytest.raises(ConfigErrors, match="pipe, socket or device"):
        check_outputs(job(), home)
    (folder / "log.log").unlink()
    (folder / "log.log").symlink_to("/etc/passwd")
    with pytest.raises(ConfigErrors, match="leads out of the home"):
        check_outputs(job(), home)
    (folder / "log.log").unlink()
    (folder / "log.log").touch()
    check_outputs(job(), home)


def test_a_home_that_is_reached_through_a_link_is_fine(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    check_outputs(job(), Home.at(tmp_path / "link"))
    check_outputs(job(), Home(tmp_path / "link"))


def test_models_are_listed_from_all_roots_and_not_through_links(home: Home, models: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "big").mkdir(parents=True)
    (shared / "big" / "config.json").write_text("{}")
    (models / "linked").symlink_to(shared / "big")
    assert [entry.id for entry in list_models(home)] == ["quantdeck/demo", "user_data/models/tiny"]
    (home.root / FILE_NAME).write_text(f'[models]\nroots = ["{shared}"]\n')
    found = [entry.id for entry in list_models(home)]
    assert found == ["quantdeck/demo", "user_data/models/tiny", str(shared / "big")]
    (home.root / FILE_NAME).write_text("[models]\nroots = 3\n")
    assert len(list_models(home)) == 2


def test_broken_settings_stop_the_check_with_their_own_words(home: Home) -> None:
    home.root.mkdir(parents=True)
    (home.root / FILE_NAME).write_text("[models]\nallow_pickle = 3\n")
    with pytest.raises(ConfigErrors, match="models.allow_pickle"):
        check_job(job(), home, confined=True)
