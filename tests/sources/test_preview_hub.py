"""The first rows of a Hub dataset, streamed through the real datasets package from a server on loopback."""

import json
import logging
import subprocess
from functools import partial

import datasets
import pytest

from backend.errors import DataError
from backend.paths import Home
from backend.schema import parse_yaml
from backend.sources import hub_token
from backend.sources import preview as preview_module
from backend.sources.preview import NotDownloadedError, preview, preview_config
from tests.conftest import demo_text
from tests.sources.hub_server import hubs

TOKEN = "example-of.a_token-1234567890"  # without the shape that every log knows
ROWS = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(60)]
FORMAT = {"TEXT_COLUMN": "question, answer", "FORMAT_STRING": "Question: {question}\nAnswer: {answer}"}
SMALL = {"CALIBRATION": {"SAMPLES": 4, "SEQUENCE_LENGTH": 32}}


@pytest.fixture(scope="module")
def repos(tmp_path_factory):
    """A dataset of Parquet with two subsets, and one of JSON lines."""
    root = tmp_path_factory.mktemp("repos")
    for subset in ("main", "other"):
        (root / "parquet" / subset).mkdir(parents=True)
        datasets.Dataset.from_list(ROWS).to_parquet(root / "parquet" / subset / "train-00000-of-00001.parquet")
    configs = [
        f"- config_name: {name}\n  data_files: [{{split: train, path: '{name}/train-*'}}]" for name in ("main", "other")
    ]
    (root / "parquet" / "README.md").write_text("---\nconfigs:\n" + "\n".join(configs) + "\n---\n")
    (root / "lines").mkdir()
    (root / "lines" / "train.jsonl").write_text("\n".join(json.dumps({"text": r["question"] * 9}) for r in ROWS))
    return {"team/qa": root / "parquet", "openai/gsm8k": root / "parquet", "team/lines": root / "lines"}


@pytest.fixture
def serve(repos, monkeypatch, tmp_path):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with hubs(monkeypatch) as start:
        yield partial(start, {}, datasets=repos)


def look(home: Home, name="team/lines", *, online=True, **changes):
    document = parse_yaml(demo_text(DATASET_NAME=name, **{**SMALL, **changes}))
    return preview(preview_config(document), home, rows=2, online=online, confined=True)


def text_of(row):
    return "".join(text for text, _ in row.pieces)


def test_rows_of_a_subset_go_through_the_format_string(home, serve):
    asked = serve()
    with pytest.raises(NotDownloadedError):
        look(home, "gsm8k_restructured", online=False)
    assert asked == []
    found = look(home, "gsm8k_restructured")  # the guides' preset: openai/gsm8k, main, with a format string
    assert text_of(found.rows[1]) == "<|begin|>Question: 1 + 1?\nAnswer: 2" and found.sequences == 4
    assert any("main/train-00000-of-00001.parquet" in path for path in asked if "resolve" in path)
    assert not any("other/train" in path for path in asked if "resolve" in path)


def test_a_connection_that_breaks_off_once_is_mended(home, serve):
    left = ["cut"]
    serve(faults=left)
    assert look(home).sequences == 4 and left == []


@pytest.mark.parametrize(
    ("options", "name", "told"),
    [
        ({"gated": ("team/lines",)}, "team/lines", "team/lines is gated: accept its conditions .* enter a token"),
        ({}, "team/absent", "the Hub has no dataset team/absent, or it is private"),
        ({"faults": ["api-cut"] * 40}, "team/lines", "the connection to the Hub failed"),
        ({"faults": ["api-429"] * 40}, "team/lines", "the Hub is busy .429, too many requests.; try again"),
    ],
)
def test_what_is_in_the_way_is_told_with_what_to_do(home, serve, options, name, told):
    serve(**options)
    with pytest.raises(DataError, match=told):
        look(home, name)


def test_a_subset_that_does_not_exist_is_told_with_those_that_do(home, serve):
    serve()
    with pytest.raises(DataError, match=r"'nothing' not found.*'main', 'other'.*subset and split"):
        look(home, "team/qa", DATASET_SUBNAME="nothing", **FORMAT)


def test_the_stored_token_opens_a_gated_dataset_and_is_never_told(home, serve, monkeypatch, caplog):
    started = []
    real = subprocess.Popen

    def spy(command, **options):
        started.append((command, options["env"]))
        return real(command, **options)

    monkeypatch.setattr(preview_module.subprocess, "Popen", spy)
    serve(gated=("team/lines",), token=TOKEN)
    hub_token.save(home, "a-wrong.token-12345678")
    with pytest.raises(DataError, match="does not accept the token") as caught:
        look(home)
    assert "a-wrong" not in caught.value.message
    hub_token.save(home, TOKEN)
    with caplog.at_level(logging.DEBUG):
        assert look(home).sequences == 4
        look(home, "quantdeck/demo")  # asks no Hub, so its program has no token
    *_, online, offline = started
    assert TOKEN in online[1].values() and TOKEN not in offline[1].values()
    assert TOKEN not in str([command for command, _ in started]) and TOKEN not in caplog.text
    with pytest.raises(DataError, match="the Hub has no dataset team/") as caught:
        look(home, f"team/{TOKEN}")
    assert TOKEN not in caught.value.message
