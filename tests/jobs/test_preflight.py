"""Refusals before any work starts: the key, the value, what is allowed; exit code 2; nothing stored."""

import json
import shutil
from pathlib import Path

import pytest

from backend.cli import main
from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors
from backend.jobs.control import submit
from backend.jobs.preflight import check_job
from backend.jobs.store import JobStore
from backend.schema import parse_yaml
from tests.conftest import demo_text, write_jsonl


def problems(home, **changes):
    with pytest.raises(ConfigErrors) as caught:
        check_job(parse_yaml(demo_text(**changes)).config, home)
    return {e.key: e.message for e in caught.value.errors}


def copy_model(target: Path, **config_changes) -> Path:
    shutil.copytree(MODEL_DIR, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **config_changes}))
    return target


def test_the_demo_passes_and_its_size_is_predicted(home):
    checked = check_job(parse_yaml(demo_text()).config, home)
    assert checked.device == "cpu" and any("CPU" in note for note in checked.notes)
    source = (MODEL_DIR / "model.safetensors").stat().st_size
    assert 0.25 * source < checked.predicted_bytes < 0.6 * source


def test_too_little_calibration_text_is_told_before_the_start(home, tmp_path):
    path = write_jsonl(tmp_path / "short.jsonl", [{"text": "One short row."}])
    assert "tokens in 1 rows" in problems(home, DATA_PATH=str(path))["DATA_PATH"]
    path = write_jsonl(tmp_path / "empty.jsonl", [{"text": ""}, {"text": " "}])
    assert "all are empty" in problems(home, DATA_PATH=str(path))["DATA_PATH"]


def test_a_missing_column_is_told_at_its_key(home, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"words": "hello"}])
    message = problems(home, DATA_PATH=str(path))["TEXT_COLUMN"]
    assert "'text'" in message and "words" in message


def test_missing_folders_are_named(home):
    assert "/no/such/model" in problems(home, MODEL="/no/such/model")["MODEL"]
    assert "no/data" in problems(home, DATA_PATH="no/data")["DATA_PATH"]
    assert "neither a folder nor a Hub id" in problems(home, MODEL="a/b/c d")["MODEL"]


def test_the_page_is_confined_to_the_home(home, tmp_path):
    model = copy_model(tmp_path / "outside")
    config = parse_yaml(demo_text(MODEL=str(model))).config
    assert check_job(config, home).model.kind == "local"
    with pytest.raises(ConfigErrors, match="only folders inside"):
        check_job(config, home, confined=True)


def test_truncated_and_corrupt_weights_are_refused(home, tmp_path):
    model = copy_model(tmp_path / "m")
    file = model / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "model.safetensors" in problems(home, MODEL=str(model))["MODEL"]
    file.write_bytes(b"\xff" * 100)
    assert "model.safetensors" in problems(home, MODEL=str(model))["MODEL"]


def test_pickle_weights_are_refused(home, tmp_path):
    model = copy_model(tmp_path / "m")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    assert "pickle" in problems(home, MODEL=str(model))["MODEL"].lower()


def test_remote_code_is_refused(home, tmp_path):
    model = copy_model(tmp_path / "m", auto_map={"AutoModelForCausalLM": "evil.Model"})
    assert "auto_map" in problems(home, MODEL=str(model))["MODEL"]


def test_an_unsupported_architecture_is_refused_with_its_name(home, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=64, vocab_size=128)).save_pretrained(folder)
    message = problems(home, MODEL=str(folder))["MODEL"]
    assert "GPT2" in message and "Conv1D" in message


def test_a_group_size_that_does_not_divide_is_told_at_its_key(home, tmp_path):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=3, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "m")
    message = problems(home, MODEL=str(tmp_path / "m"))["llm.AutoAWQ.Q_GROUP_SIZE"]
    assert "found 128" in message and "192 inputs" in message and "use 32" in message


def test_an_unknown_task_is_refused_with_near_names(home):
    message = problems(home, EVALUATION={"TASKS": ["arc_chalenge:25"]})["EVALUATION.TASKS"]
    assert "arc_challenge" in message


def test_nothing_is_stored_for_a_refused_job(home):
    with pytest.raises(ConfigErrors):
        submit(home, demo_text(MODEL="/no/such/model"))
    assert JobStore(home).jobs() == []


@pytest.mark.parametrize(
    "text", ["MODEL: [", demo_text(ALGORITHM="Nope"), demo_text(MODEL="/no/such/model"), demo_text(JOB_ID="../x")]
)
def test_the_command_line_answers_2_and_the_reason(home, tmp_path, capsys, text):
    path = tmp_path / "job.yaml"
    path.write_text(text)
    for command in ("validate", "run"):
        assert main([command, str(path), "--home", str(home.root)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert not home.jobs_db.exists() or JobStore(home).jobs() == []


def test_the_guide_and_the_demo_validate(home, capsys):
    assert main(["validate", "examples/awq_guide.yaml", "--home", str(home.root)]) == 0
    assert "AutoAWQ of meta-llama/Meta-Llama-3.1-8B-Instruct" in capsys.readouterr().out
    assert main(["validate", "examples/autoawq_demo.yaml", "--home", str(home.root)]) == 0
