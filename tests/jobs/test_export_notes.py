"""What is lost on the way to another program is told, and what it needs besides."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

from backend.errors import ConfigError
from backend.jobs.export_notes import exported
from tests.conftest import EXAMPLES, demo_text
from tests.jobs.aqlm_jobs import aqlm_text


@pytest.mark.parametrize("name", ["awq_guide", "aqlm_guide", "tensorrtllm_guide"])
def test_a_guides_file_loses_nothing_for_the_original_system(name):
    text = (EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8")
    found = exported(text, "nyuntam")
    assert (found.left_out, found.changed, found.notes) == ((), (), ())
    assert found.text == text.replace("    ...other params", "    # ...other params")
    assert YAML(typ="safe").load(found.text)["MODEL"], "a plain YAML reader takes it"


def test_what_is_left_out_and_set_is_told():
    text = aqlm_text("job", EFFORT="fast", FINETUNE_DATA={"PRESET": "gsm8k_restructured"}, CALIBRATION={"SAMPLES": 64})
    found = exported(text, "nyuntam")
    assert {"llm.AQLM.EFFORT", "llm.AQLM.FINETUNE_DATA", "CALIBRATION", "EVALUATION", "BENCHMARK"} <= set(
        found.left_out
    )
    assert ("llm.AQLM.calibration_config.nsamples", 64) in found.changed
    for key in found.left_out:
        assert f"{key.rpartition('.')[2]}:" not in found.text


def test_what_exists_only_here_is_told():
    found = exported(demo_text(), "nyuntam")
    assert [note.split()[0] for note in found.notes] == ["MODEL", "DATASET_NAME"]
    assert set(found.left_out) == {"CALIBRATION", "EVALUATION", "BENCHMARK"}
    found = exported(demo_text(MODEL="a/b", DATASET_NAME=None, DATA_PATH="rows.jsonl"), "nyuntam")
    assert len(found.notes) == 1 and found.notes[0].startswith("DATA_PATH is a file")
    (note,) = exported(demo_text(MODEL="a/b", DATASET_NAME="gsm8k_restructured"), "nyuntam").notes
    assert "create_dataset.py" in note


def test_a_recipe_is_told_what_it_does_not_hold():
    text = (EXAMPLES / "llmcompressor_guide.yaml").read_text(encoding="utf-8")
    (note,) = exported(text, "llmcompressor").notes
    for part in ("Meta-Llama-3-8B-Instruct", "HuggingFaceH4/ultrachat_200k", "num_calibration_samples=512", "=2048"):
        assert part in note


def test_what_is_not_possible_is_said_with_its_key():
    with pytest.raises(ConfigError, match="ALGORITHM: found 'AQLM'"):
        exported(aqlm_text("job"), "llmcompressor")
