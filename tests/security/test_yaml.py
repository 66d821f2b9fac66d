"""Hostile and broken job files: refused in time, with the line, before anything is made of them."""

from __future__ import annotations

import itertools
import os
import time
from pathlib import Path

import pytest

from backend.errors import ConfigError, ConfigErrors
from backend.schema import parse_yaml, read_yaml
from backend.schema.document import decode_yaml
from backend.schema.yaml_text import MAX_ALIASES, MAX_BYTES, MAX_DEPTH, MAX_NODES
from tests.conftest import demo_text

LAUGHS = "a: &a [1]\n" + "".join(
    f"{key}: &{key} [{', '.join([f'*{before}'] * 9)}]\n" for before, key in itertools.pairwise("abcdefghijkl")
)
QUICK_S = 20.0
"""Generous: the slowest of them takes a second of an idle machine, and took a minute or all memory without limits."""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, f"more than {MAX_ALIASES} aliases"),
        ("a: &a {x: 1}\n" + "".join(f"b{i}: {{<<: *a}}\n" for i in range(3000)), "aliases"),
        ("a: &a [*a]\n", ""),
        ("A: " + "[" * 100_000, f"line 1: the file has more than {MAX_DEPTH} levels"),
        ("A: " + "{a: " * 50_000, f"more than {MAX_DEPTH} levels"),
        ("\n".join(" " * i + "a:" for i in range(600)), f"line 21: the file has more than {MAX_DEPTH} levels"),
        ("- " * 100_000, f"more than {MAX_DEPTH} levels"),
        ("A: [" + "1," * 100_000 + "]", f"more than {MAX_NODES} values"),
        ("".join(f"k{i}: {i}\n" for i in range(9000)), f"more than {MAX_NODES} values"),
        ("#\n" * 100_000, "lines; a job file has at most"),
        ("A: " + "x" * 20_000_000, f"a job file has at most {MAX_BYTES}"),
        ("A: " + "9" * 240_000, "not valid YAML"),
        ("A: 0x" + "f" * 240_000, ""),
        ("A: " + "9" * 4000 + ".0", "finite"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else None,
)
def test_bombs_are_refused_soon(text: str, says: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        _ = parse_yaml(text).config
    assert says in caught.value.message
    assert time.monotonic() - began < QUICK_S


def test_a_long_but_honest_file_is_read() -> None:
    rows = [{"PATTERN": f"*.layers.{i}.mlp.down_proj", "W_BIT": 8} for i in range(500)]
    text = demo_text(ALGORITHM="Native", llm={"Native": {"OVERRIDES": rows}})
    assert len(parse_yaml(text).config.algorithm_settings.OVERRIDES) == 500


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:subprocess.Popen [['touch', '{canary}']]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!include {canary}",
        "!ENV ${HOME}",
        "!!binary aGVsbG8=",
        "!!set {a, b}",
    ],
)
def test_tags_are_refused_and_run_nothing(value: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    text = demo_text() + f"EXTRA: {value.replace('{canary}', str(canary))}\n"
    with pytest.raises(ConfigError):
        parse_yaml(text)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        ("JOB_ID: a\nJOB_ID: b\n", "", "line 2"),
        ("llm:\n  AutoAWQ:\n    W_BIT: 4\n    W_BIT: 3\n", "", "line 4"),
        ("1: a\n'1': b\n", "", "twice"),
        ("? [a, b]\n: 1\n", "", "key"),
        ("CALIBRATION:\n  SAMPLES: .nan\n", "CALIBRATION.SAMPLES", "finite"),
        ("CALIBRATION:\n  SAMPLES: 1e999\n", "CALIBRATION.SAMPLES", "finite"),
        ("CALIBRATION:\n  SAMPLES: -.inf\n", "CALIBRATION.SAMPLES", "finite"),
    ],
)
def test_what_is_no_plain_value_is_named(text: str, key: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text)
    assert caught.value.key == key
    assert says in caught.value.message


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"llm": {"AutoAWQ": {"W_BIT": -1}}}, "llm.AutoAWQ.W_BIT"),
        ({"llm": {"AutoAWQ": {"W_BIT": "4"}}}, "llm.AutoAWQ.W_BIT"),
        ({"llm": {"AutoAWQ": {"ZERO_POINT": "true"}}}, "llm.AutoAWQ.ZERO_POINT"),
        ({"llm": {"AutoAWQ": {"ZERO_POINT": 1}}}, "llm.AutoAWQ.ZERO_POINT"),
        ({"EVALUATION": {"ENABLED": "no"}}, "EVALUATION.ENABLED"),
        ({"EVALUATION": {"TASKS": ["../x.yaml"]}}, "EVALUATION.TASKS.0.NAME"),
        ({"EVALUATION": {"TASKS": ["/etc/task"]}}, "EVALUATION.TASKS.0.NAME"),
        ({"EVALUATION": {"TASKS": ["--include_path=/tmp"]}}, "EVALUATION.TASKS.0.NAME"),
        ({"JOB_ID": "demo\n"}, "JOB_ID"),
        ({"JOB_ID": "..%2e"}, "JOB_ID"),
        ({"JOB_ID": "a\u2215b"}, "JOB_ID"),
        ({"USER_FOLDER": "../elsewhere"}, "USER_FOLDER"),
    ],
)
def test_a_wrong_value_is_refused_at_its_key(changes: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigErrors) as caught:
        _ = parse_yaml(demo_text(**changes)).config
    assert key in [error.key for error in caught.value.errors]


@pytest.mark.parametrize(
    "key",
    [
        "LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PYTHONSTARTUP", "CUDA_VISIBLE_DEVICES", "PATH", "HOME",
        "HF_ENDPOINT", "hf_endpoint", "HF_HUB_ENDPOINT", "HF_TOKEN", "HTTPS_PROXY", "https_proxy", "ENDPOINT",
        "BASE_URL", "ENV", "ENVIRONMENT", "INCLUDE_PATH", "TORCH_EXTENSIONS_DIR", "QUANTDECK_FAILPOINT",
    ],
)  # fmt: skip
@pytest.mark.parametrize("section", [None, "llm", "EVALUATION"])
def test_a_job_cannot_set_its_environment_or_where_it_downloads_from(key: str, section: str | None) -> None:
    changes: dict[str, object] = {key: "x"} if section is None else {section: {key: "x"}}
    with pytest.raises(ConfigErrors) as caught:
        _ = parse_yaml(demo_text(**changes)).config
    assert [error.key for error in caught.value.errors] == [key if section is None else f"{section}.{key}"]


@pytest.mark.parametrize("key", ["TRUST_REMOTE_CODE", "trust_remote_code", "ALLOW_REMOTE_CODE", "ALLOW_PICKLE"])
def test_a_job_cannot_allow_foreign_code(key: str) -> None:
    if key != "TRUST_REMOTE_CODE":  # which the operator has to allow as well
        with pytest.raises(ConfigErrors, match=key):
            _ = parse_yaml(demo_text(**{key: True})).config
    with pytest.raises(ConfigErrors, match=key):
        _ = parse_yaml(demo_text(llm={"AutoAWQ": {key: "yes"}})).config
    assert parse_yaml(demo_text(**{key: False})).config.JOB_ID == "demo"


def write(tmp_path: Path, raw: bytes) -> str:
    path = tmp_path / "job.yaml"
    path.write_bytes(raw)
    return str(path)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"", "nothing"),
        (b"# only a comment\n", "nothing"),
        (b"\xef\xbb\xbf", "nothing"),
        (b"MODEL: x\nJOB_ID: caf\xe9\n", "line 2 is not UTF-8"),
        ("MODEL: x\n".encode("utf-16"), "not UTF-8"),
        (b'MODEL: x\nFORMAT_STRING: "abc', "line 2"),
        (b"MODEL: x\nllm:\n  AutoAWQ: {W_BIT: 4", "line 3"),
        (b"MODEL: x\nJOB_I", "line 2"),
        (b"MODEL: x\n\x00\x00\x00", "line 2"),
        (b"MODEL: x\n\tJOB_ID: y\n", "line 2"),
        (b"\x00" * 4096, "line 1"),
        (b"\x80\x04\x95", "line 1 is not UTF-8"),
        (b"x" * 300_000, "more than"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path: Path, raw: bytes, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_yaml(write(tmp_path, raw))
    assert says in caught.value.message


def test_a_file_cut_at_any_byte_is_read_or_refused_with_words(tmp_path: Path, guide_text: str) -> None:
    raw = guide_text.encode()
    whole = parse_yaml(guide_text).config
    for end in range(0, len(raw), 97):
        try:
            config = read_yaml(write(tmp_path, raw[:end])).config
        except ConfigError as error:
            assert error.message
        else:
            assert config.MODEL == whole.MODEL


def test_bom_and_windows_lines_are_read(tmp_path: Path, guide_text: str) -> None:
    raw = b"\xef\xbb\xbf" + guide_text.replace("\n", "\r\n").encode()
    assert read_yaml(write(tmp_path, raw)).config == parse_yaml(guide_text).config
    assert decode_yaml(raw).startswith("\ufeff")


def test_pipes_and_devices_are_no_job_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (str(tmp_path / "pipe"), "/dev/zero", str(tmp_path), "a\0b"):
        with pytest.raises(ConfigError, match="cannot read"):
            read_yaml(path)
