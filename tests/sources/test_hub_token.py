"""The token for the Hub: stored privately, used where it may be, never told."""

import os
import stat
import subprocess
import sys

import pytest

from backend.errors import ConfigError
from backend.jobs.program import Command, program_environment
from backend.jobs.redact import redact
from backend.paths import PROJECT
from backend.sources import hub_token

TOKEN = "example-of.a_token-1234567890"  # without the shape that every log knows


@pytest.fixture(autouse=True)
def no_token(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def command(home, *words, typed=""):
    done = subprocess.run(
        [sys.executable, "-m", "backend", "token", *words, "--home", str(home.root)],
        cwd=PROJECT, input=typed, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def test_it_is_set_told_of_and_cleared_by_commands(home):
    assert "No token" in command(home, "status")[1]
    code, told = command(home, "set", "--token-stdin", typed=f"{TOKEN}\n")
    assert code == 0 and TOKEN not in told
    assert stat.S_IMODE(hub_token.token_file(home).stat().st_mode) == 0o600
    told = command(home)[1]
    assert "is stored since 20" in told and TOKEN not in told
    assert command(home, "clear") == (0, "the token is removed\n")
    assert command(home, "clear") == (0, "no token was stored\n")
    assert not hub_token.token_file(home).exists()


@pytest.mark.parametrize("text", ["", "short", "two words here", "x" * 600, "hf_abc\x00defghi", "töken-töken"])
def test_what_is_no_token_is_refused_and_not_repeated(home, text):
    with pytest.raises(ConfigError) as caught:
        hub_token.save(home, text)
    assert "is no token" in caught.value.message and (not text or text not in caught.value.message)
    assert not hub_token.token_file(home).exists()


def test_only_programs_that_may_see_it_get_it_and_it_goes_before_the_environments(home, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "of-the-environment")
    file = hub_token.token_file(home)
    download = Command(("python", "-m", "x"), hub_token=True, token_file=file)
    others = (Command(("python", "-m", "x"), token_file=file), Command(("python", "-m", "x"), "autoawq"))
    assert program_environment(download, {})["HF_TOKEN"] == "of-the-environment"
    hub_token.save(home, TOKEN)
    assert program_environment(download, {})["HF_TOKEN"] == TOKEN
    for other in others:
        assert TOKEN not in program_environment(other, {}).values()


def test_text_of_whoever_read_it_is_redacted(home):
    other = "another.token-abcdefgh"
    hub_token.save(home, TOKEN)
    hub_token.token_file(home).write_text(hub_token.token_file(home).read_text().replace(TOKEN, other))
    assert other in redact(f"GET with {other}")
    hub_token.read(hub_token.token_file(home))
    assert other not in redact(f"GET with {other}")


@pytest.mark.parametrize("content", ["", "[]", '{"version": 1}', '{"token": 5, "saved_at": "x"}'])
def test_a_file_that_is_not_ours_is_an_error_that_says_so(home, content):
    hub_token.save(home, TOKEN)
    hub_token.token_file(home).write_text(content)
    with pytest.raises(ConfigError, match="enter it again"):
        hub_token.status(home)


def test_a_file_that_others_can_read_is_not_used(home):
    hub_token.save(home, TOKEN)
    os.chmod(hub_token.token_file(home), 0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        hub_token.variables(hub_token.token_file(home))
