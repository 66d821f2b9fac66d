"""Code that comes with a model: off, and with the job's and the operator's leave on, in that job's programs alone.

The model is the built-in one under a class of its own, whose modules note every process that imports them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backend.demo import MODEL_DIR
from backend.errors import ConfigError, ConfigErrors, ModelError
from backend.formats import remote_code
from backend.formats.config import read_config_json
from backend.formats.remote_code import MODULES_VARIABLE, VARIABLE
from backend.jobs import launch
from backend.jobs.preflight import check_job
from backend.jobs.program import Command, program_environment
from backend.jobs.publish import read_manifest
from backend.jobs.store import JobStore
from backend.jobs.trust import code_modules
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from backend.settings import FILE_NAME
from tests.conftest import demo_text
from tests.jobs.test_job import cli, until
from ui.chat_pair import ChatPair
from ui.draft import FIELDS, open_draft
from ui.jobview import notices
from ui.review import review, review_html

CONFIGURATION = """
from transformers import LlamaConfig

class CanaryConfig(LlamaConfig):
    model_type = "canary"
"""
MODELING = """
import os, sys
from transformers import LlamaForCausalLM
from .configuration_canary import CanaryConfig

with open({canary!r}, "a") as file:
    file.write(" ".join(sys.orig_argv) + "\\n")

class CanaryForCausalLM(LlamaForCausalLM):
    config_class = CanaryConfig
"""
CLASSES = {
    "AutoConfig": "configuration_canary.CanaryConfig",
    "AutoModelForCausalLM": "modeling_canary.CanaryForCausalLM",
}
ALLOWED = "[models]\nallow_remote_code = true\n"
QUICK = {
    "CALIBRATION": {"SAMPLES": 4, "SEQUENCE_LENGTH": 64},
    "EVALUATION": {
        "DATASET_NAME": "quantdeck/demo",
        "PROTOCOLS": ["full_window"],
        "WINDOW": 64,
        "MAX_WINDOWS": 4,
        "TASKS": [],
    },
    "BENCHMARK": {"PROMPT_TOKENS": 8, "NEW_TOKENS": 4, "WARMUP": 0, "REPETITIONS": 3},
}


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.at(tmp_path / "home")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary.txt"


@pytest.fixture
def model(tmp_path: Path, canary: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(MODEL_DIR, folder)
    (folder / "configuration_canary.py").write_text(CONFIGURATION)
    (folder / "modeling_canary.py").write_text(MODELING.format(canary=str(canary)))
    change(folder, auto_map=CLASSES, model_type="canary", architectures=["CanaryForCausalLM"])
    return folder


def change(folder: Path, file: str = "config.json", **keys: object) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def allow(home: Home, text: str = ALLOWED) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / FILE_NAME).write_text(text)


def text_of(model: Path, **keys: object) -> str:
    return demo_text("canary", MODEL=str(model), TRUST_REMOTE_CODE=True, **{**QUICK, **keys})


def problems(home: Home, text: str) -> dict[str, str]:
    with pytest.raises(ConfigErrors) as caught:
        check_job(parse_yaml(text).config, home)
    return {error.key: error.message for error in caught.value.errors}


def test_a_job_needs_its_own_and_the_operators_leave(home, model, canary):
    allow(home)
    told = problems(home, demo_text("canary", MODEL=str(model)))
    assert list(told) == ["MODEL"] and "TRUST_REMOTE_CODE" in told["MODEL"] and "allow_remote_code" in told["MODEL"]
    allow(home, "")
    told = problems(home, text_of(model))
    assert "found True" in told["TRUST_REMOTE_CODE"] and "allow_remote_code = true" in told["TRUST_REMOTE_CODE"]
    allow(home)
    assert check_job(parse_yaml(text_of(model)).config, home).model.path == model
    assert not canary.exists()


def test_the_original_package_is_refused(home, model):
    allow(home)
    told = problems(home, text_of(model, llm={"AutoAWQ": {"ENGINE": "autoawq"}}))
    assert "ENGINE: native" in told["TRUST_REMOTE_CODE"]


@pytest.mark.parametrize(
    "keys",
    [
        {"auto_map": {"AutoConfig": "somebody/else--configuration_canary.CanaryConfig"}},
        {"auto_map": {"AutoConfig": "../configuration_canary.CanaryConfig"}},
        {"auto_map": {"AutoConfig": "absent.CanaryConfig"}},
        {"_attn_implementation_internal": "somebody/kernel"},
        {"custom_pipelines": {"x": {"impl": "x.Y"}}},
        {"attn_implementation": "somebody/kernel"},
    ],
)
def test_code_of_elsewhere_is_refused_in_any_case(model, keys, canary):
    change(model, **keys)
    with pytest.raises(ModelError, match=next(iter(keys))):
        read_config_json(model, remote_code=True)
    assert not canary.exists()


def test_a_tokenizer_may_lack_one_of_its_two_classes(model):
    (model / "tokens.py").write_text("")
    change(model, "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokens.Fast"]})
    assert read_config_json(model, remote_code=True)["model_type"] == "canary"
    change(model, "tokenizer_config.json", auto_map={"AutoTokenizer": ["x/y--tokens.Slow", None]})
    with pytest.raises(ModelError, match=r"tokenizer_config.json.*none of another repository"):
        read_config_json(model, remote_code=True)


def test_only_the_runner_gives_the_right(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "1")  # as somebody's shell may have it
    monkeypatch.setenv(MODULES_VARIABLE, "/elsewhere")
    command = Command((sys.executable, "-m", "x"))
    for one in (command, Command(command.argv, hub_token=True)):
        assert not {VARIABLE, MODULES_VARIABLE} & program_environment(one, {}).keys()
    given = program_environment(Command(command.argv, code_modules=tmp_path), {})
    assert (given[VARIABLE], given[MODULES_VARIABLE]) == ("1", str(tmp_path))


def test_a_job_runs_it_in_its_own_programs_alone(home, model, canary):
    allow(home)
    (home.root / "job.yaml").write_text(text_of(model))
    done = cli(home, "run", str(home.root / "job.yaml"), "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    programs = {line.split(" -m ")[1].split()[0] for line in canary.read_text().splitlines()}
    run_models = {
        "backend.engines.native", "backend.evaluate.worker", "backend.evaluate.fidelity", "backend.chat.model_process",
    }  # fmt: skip
    assert run_models <= programs <= run_models | {"backend.sources.prepare"}
    job = JobStore(home).get("canary")
    artefact = Path(job.artefact)
    assert {"configuration_canary.py", "modeling_canary.py"} <= read_manifest(artefact)["files"].keys()
    assert list((home.run_dir(job.uid) / "modules").rglob("modeling_canary.py"))

    # The result is as little trusted as the model was.
    load = "import sys; from backend.formats.loader import load_model; print(type(load_model(sys.argv[1])).__name__)"
    for modules in (None, home.root / "modules"):
        environment = remote_code.environment(dict(os.environ), modules)
        command = [sys.executable, "-c", load, str(artefact)]
        told = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
        if modules:
            assert told.stdout.strip() == "CanaryForCausalLM", told.stderr
        else:
            assert told.returncode != 0 and "auto_map" in told.stderr

    assert "may run code that comes with its model" in notices(job) and "qd-error" in notices(job)
    before = canary.read_text()
    allow(home, "")
    with pytest.raises(ConfigError, match="allow_remote_code"):
        list(ChatPair(home).load(job.uid))
    assert canary.read_text() == before
    allow(home)
    assert code_modules(home, job) == home.run_dir(job.uid) / "modules"
    pair = ChatPair(home)
    try:
        list(pair.load(job.uid))
        assert pair.key == job.uid
    finally:
        pair.unload()


def test_leave_that_was_taken_back_stops_the_job(home, model, canary):
    allow(home)
    text = text_of(model)
    JobStore(home).create(text, parse_yaml(text).config, device="cpu")
    allow(home, "")
    launch.ensure_scheduler(home)
    job = until(home, "canary", lambda job: not job.is_active, 120.0)
    assert (job.state, job.outcome) == ("failed", "bad_input") and "allow_remote_code" in job.reason
    assert not canary.exists()


def test_the_form_warns_in_red(home, model):
    allow(home, f'[models]\nallow_remote_code = true\nroots = ["{model.parent}"]\n')
    assert "TRUST_REMOTE_CODE" in [field.key for field in FIELDS]
    for asked in (True, False):
        draft = open_draft(text_of(model) if asked else demo_text("plain"))
        shown = review_html(review(home, draft, draft.shown))
        assert ("may run code that comes with its model" in shown and "qd-error" in shown) == asked, shown
