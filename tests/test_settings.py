"""quantdeck.toml: defaults, every kind of mistake, and that a mistake names file, key, value and what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from backend.errors import ConfigError
from backend.paths import Home
from backend.settings import FILE_NAME, Settings


def load(tmp_path: Path, text: str | bytes) -> Settings:
    raw = text.encode() if isinstance(text, str) else text
    (tmp_path / FILE_NAME).write_bytes(raw)
    return Settings.load(Home(tmp_path))


def test_without_a_file_everything_has_its_default(tmp_path: Path) -> None:
    settings = Settings.load(Home(tmp_path))
    assert settings == Settings()
    assert settings.jobs.cpu_slots == 1
    assert settings.jobs.cancel_grace_s == (30.0, 15.0)
    assert settings.models.allow_pickle is False
    assert settings.models.allow_remote_code is False
    assert settings.web.origins == ()
    assert settings.tensorrt_llm.environment == ""
    assert settings.tensorrt_llm.image == "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
    assert settings.served.urls == ("http://127.0.0.1:8000",)


def test_every_setting_is_read(tmp_path: Path) -> None:
    text = """\
[jobs]
cpu_slots = 3
cancel_grace_s = [5, 2.5]
log_bytes = 1000000
log_files = 2
line_bytes = 4096
min_free_bytes = 5000
[models]
roots = ["/srv/models"]
allow_pickle = true
allow_remote_code = true
[web]
origins = ["https://Quant.example.org", "http://10.0.0.5:8080"]
session_hours = 1
max_upload_bytes = 1000
[served]
urls = ["http://127.0.0.1:8001/v1", "https://gpu.example.org/", "https://gpu.example.org"]
[tensorrt_llm]
environment = "/srv/tensorrt_llm"
image = "registry.example.org/tensorrt-llm@sha256:0123"
docker = "/usr/bin/podman"
"""
    settings = load(tmp_path, text)
    assert settings.jobs.cpu_slots == 3
    assert settings.jobs.cancel_grace_s == (5.0, 2.5)
    assert settings.models.roots == ("/srv/models",)
    assert settings.models.allow_pickle is True
    assert settings.models.allow_remote_code is True
    assert settings.web.origins == ("https://quant.example.org", "http://10.0.0.5:8080")
    assert settings.web.session_hours == 1.0
    assert settings.tensorrt_llm.environment == "/srv/tensorrt_llm"
    assert settings.tensorrt_llm.image == "registry.example.org/tensorrt-llm@sha256:0123"
    assert settings.tensorrt_llm.docker == "/usr/bin/podman"
    assert settings.served.urls == ("http://127.0.0.1:8001", "https://gpu.example.org")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().jobs.cpu_slots = 5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("[jobs]\ncpu_slot = 2", "jobs.cpu_slot", "did you mean jobs.cpu_slots?"),
        ("cpu_slots = 2", "cpu_slots", "did you mean jobs.cpu_slots?"),
        ("[modles]\nroots = []", "modles", "did you mean models?"),
        ("[jobs]\nqqqq = 2", "jobs.qqqq", "there are jobs.cpu_slots"),
        ('[tensorrt_llm]\nenvironment = "venv"', "tensorrt_llm.environment", "the absolute path of a folder"),
        ('[tensorrt_llm]\nenvironment = "/a/../b"', "tensorrt_llm.environment", "without '..'"),
        ('[tensorrt_llm]\nimage = "--privileged"', "tensorrt_llm.image", "does not begin with '-'"),
        ('[tensorrt_llm]\ndocker = "sudo docker"', "tensorrt_llm.docker", "without spaces"),
        ('[jobs]\ncpu_slots = "2"', "jobs.cpu_slots", "found '2'; it must be a whole number"),
        ("[jobs]\ncpu_slots = true", "jobs.cpu_slots", "found true; it must be a whole number"),
        ("[jobs]\ncpu_slots = 1.5", "jobs.cpu_slots", "found 1.5; it must be a whole number"),
        ("[jobs]\ncpu_slots = 0", "jobs.cpu_slots", "found 0; it must be at least 1"),
        ("[jobs]\ncpu_slots = 5000", "jobs.cpu_slots", "found 5000; it must be at most 1024"),
        ("[jobs]\ncancel_grace_s = [1, -1]", "jobs.cancel_grace_s.1", "at least 0"),
        ("[jobs]\ncancel_grace_s = [1, nan]", "jobs.cancel_grace_s.1", "finite number"),
        ("[jobs]\ncancel_grace_s = [1]", "jobs.cancel_grace_s.1", "two numbers"),
        ("[jobs]\ncancel_grace_s = [1, 2, 3]", "jobs.cancel_grace_s", "two numbers"),
        ("[jobs]\ncancel_grace_s = 30", "jobs.cancel_grace_s", "a list"),
        ("jobs = 3", "jobs", "a section"),
        ('[models]\nallow_pickle = "true"', "models.allow_pickle", "true or false"),
        ("[models]\nallow_pickle = 1", "models.allow_pickle", "true or false"),
        ('[models]\nroots = ["models"]', "models.roots", "absolute path"),
        ('[models]\nroots = ["/srv/../etc"]', "models.roots", "without '..'"),
        ('[models]\nroots = ["/"]', "models.roots", "the whole file system"),
        ("[models]\nroots = [1]", "models.roots.0", "text in quotes"),
        ('[web]\norigins = ["quant.example.org"]', "web.origins", "scheme://host"),
        ('[web]\norigins = ["https://quant.example.org/"]', "web.origins", "without a path"),
        ('[web]\norigins = ["https://me@quant.example.org"]', "web.origins", "scheme://host"),
        ('[web]\norigins = ["*"]', "web.origins", "scheme://host"),
        ('[web]\norigins = ["https://a:99999"]', "web.origins", "scheme://host"),
        ('[served]\nurls = ["gpu:8000"]', "served.urls", "http://host:port"),
        ('[served]\nurls = ["http://me:secret@gpu:8000"]', "served.urls", "without a user, password"),
        ("[web]\nsession_hours = 0", "web.session_hours", "more than 0"),
        ("[web]\nsession_hours = inf", "web.session_hours", "finite"),
    ],
)
def test_a_mistake_names_key_value_and_file(tmp_path: Path, text: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert key in [e.key for e in caught.value.errors]  # type: ignore[attr-defined]
    assert says in caught.value.message
    assert str(tmp_path / FILE_NAME) in caught.value.message


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, '[jobs]\ncpu_slots = 0\n[models]\nallow_pickle = "no"\n')
    assert caught.value.message.count("\n") == 1


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[jobs\ncpu_slots = 1", "line 1"),
        (b"[jobs]\ncpu_slots = 1\ncpu_slots = 2\n", "line 3"),
        (b"[jobs]\n# caf\xe9\n", "line 2: not UTF-8"),
        (b"[jobs]\ncpu_slots =", "at end of document"),
        (b"#" * 200_000, "more than 100000 bytes"),
        (b"a = " + b"[" * 50_000, "not valid TOML"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(tmp_path: Path, raw: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, raw)
    assert says in caught.value.message
    assert FILE_NAME in caught.value.message


def test_a_byte_order_mark_and_windows_lines_are_no_mistakes(tmp_path: Path) -> None:
    assert load(tmp_path, b"\xef\xbb\xbf[jobs]\r\ncpu_slots = 2\r\n").jobs.cpu_slots == 2


def test_a_folder_in_place_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).mkdir()
    with pytest.raises(ConfigError, match="cannot read"):
        Settings.load(Home(tmp_path))


def test_roots_are_resolved(tmp_path: Path) -> None:
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    settings = load(tmp_path, f'[models]\nroots = ["{tmp_path}/link"]')
    assert settings.model_roots(Home(tmp_path)) == (tmp_path / "user_data" / "models", real)
