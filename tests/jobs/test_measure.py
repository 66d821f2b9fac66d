"""What the results of the measuring stages are kept by: everything that they depend on, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backend.engines.configurations import Configuration
from backend.jobs import measure
from backend.jobs.run import Run
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.conftest import demo_text, write_jsonl

ONE = Configuration("w4", "4 bit", "fake", {})


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Run:
    """A job whose model is made, and whose text is there."""
    text = demo_text("one")
    config = parse_yaml(text).config
    job = JobStore(home).create(text, config, device="cpu")
    made = Run(home, job, config, home.run_dir(job.uid), (ONE,))
    for folder in (tmp_path / "base", made.target(ONE)):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
    inputs = {
        "model_dir": str(tmp_path / "base"), "text_name": "words:test",
        "text_file": str(write_jsonl(tmp_path / "text.jsonl", [{"text": "words"}])),
    }  # fmt: skip
    made.result_file("download").parent.mkdir(parents=True)
    made.result_file("download").write_text(json.dumps(inputs))
    return made


def keys(run: Run) -> tuple[str, str, str]:
    """Of the baseline's evaluation, the quantized model's, and the comparison of outputs."""
    quantized, fidelity = (measure.PROGRAMS[name][1] for name in ("evaluate_quantized", "evaluate_fidelity"))
    return measure.baseline_key(run), quantized(run, ONE), fidelity(run, ONE)


def changed(run: Run, before: tuple[str, str, str]) -> list[bool]:
    return [a != b for a, b in zip(before, keys(run), strict=True)]


def test_outputs_are_compared_again_when_either_model_or_the_text_has_changed(run: Run, tmp_path: Path) -> None:
    before = keys(run)
    assert changed(run, before) == [False, False, False]
    (tmp_path / "base" / "model.safetensors").write_bytes(b"others!")
    assert changed(run, before) == [True, False, True]
    before = keys(run)
    (run.target(ONE) / "model.safetensors").write_bytes(b"others!")
    assert changed(run, before) == [False, True, True]
    before = keys(run)
    write_jsonl(tmp_path / "text.jsonl", [{"text": "other words"}])
    assert changed(run, before) == [True, True, True]


@pytest.mark.parametrize("setting", [{"FIDELITY_WINDOWS": 32}, {"WINDOW": 64}, {"FIDELITY": False}])
def test_its_settings_leave_the_cached_baseline_alone(run: Run, setting: dict[str, object]) -> None:
    before = keys(run)
    run.config = parse_yaml(demo_text("one", EVALUATION=setting)).config
    touches_all = "WINDOW" in setting
    assert changed(run, before) == [touches_all, touches_all, "FIDELITY" not in setting]


def test_the_request_names_what_the_protocol_tells(run: Run) -> None:
    command = measure.PROGRAMS["evaluate_fidelity"][0](run, ONE)
    assert command.module == "backend.evaluate.fidelity"
    request = json.loads(Path(command.argv[3]).read_text())
    assert request["base"]["name"] == "quantdeck/demo" and len(request["base"]["sha256"]) == 64
    assert (request["windows"], request["max_windows"], request["window"]) == (64, 4, 512)
    assert request["spool_dir"] == str(run.run_dir) and "configuration" not in request


def test_text_is_needed_for_perplexity_and_for_the_comparison() -> None:
    def asked(**settings: object) -> tuple[bool, bool]:
        found = parse_yaml(demo_text(EVALUATION=settings)).config.EVALUATION
        return found.needs_text, found.compares_outputs

    assert asked() == (True, True)
    assert asked(PROTOCOLS=[]) == (True, True)
    assert asked(FIDELITY=False) == (True, False)
    assert asked(PROTOCOLS=[], FIDELITY=False) == (False, False)
    assert asked(ENABLED=False) == (False, False)
