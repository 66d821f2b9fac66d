"""Refusals before any work starts: the key, the value, what is allowed; exit code 2; nothing stored."""

import json
import re
import shutil
from pathlib import Path

import pytest

from backend.cli import main
from backend.demo import MODEL_DIR
from backend.errors import ConfigErrors, ModelError
from backend.jobs.control import submit
from backend.jobs.preflight import check_job
from backend.jobs.store import JobStore
from backend.schema import parse_yaml
from backend.sources.quick_check import quick_check
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
    with pytest.raises(ConfigErrors, match="from this page only what lies inside"):
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


def narrow_model(folder: Path) -> Path:
    """Inputs of 96, and of 192 for down_proj: 32 fits all, 64 one, 128 none."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=1, num_attention_heads=3, vocab_size=64
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    shutil.copy(MODEL_DIR / "tokenizer.json", folder)
    return folder


def native(**section):
    return {"ALGORITHM": "Native", "llm": {"Native": section}}


def test_a_group_size_that_fits_nothing_is_told_at_its_key(home, tmp_path):
    model = str(narrow_model(tmp_path / "m"))
    message = problems(home, MODEL=model)["llm.AutoAWQ.Q_GROUP_SIZE"]
    assert "found 128" in message and "(96, 192)" in message and "use 32 to fit all of them" in message
    message = problems(home, MODEL=model, **native(Q_GROUP_SIZE=[128, 32]))["llm.Native.Q_GROUP_SIZE"]
    assert "found 128" in message
    message = problems(
        home, MODEL=model, ALGORITHM="LLMCompressor", llm={"LLMCompressor": {"ENGINE": "native"}}
    )["llm.LLMCompressor.GROUP_SIZE"]  # fmt: skip
    assert "found 128" in message
    check_job(parse_yaml(demo_text(MODEL=model, **native(Q_GROUP_SIZE=-1))).config, home)


def test_linears_that_stay_in_16_bits_are_told_with_the_reason(home, tmp_path):
    config = parse_yaml(demo_text(MODEL=str(narrow_model(tmp_path / "m")), **native(Q_GROUP_SIZE=[64, 32]))).config
    (note,) = [n for n in check_job(config, home).notes if "16 bits" in n]
    assert note == (
        "GPTQ 4 bit, groups of 64: 6 of 7 Linears stay in 16 bits: 6 since group size 64 does not divide its "
        "96 inputs (e.g. model.layers.0.mlp.gate_proj)."
    )


def test_each_configuration_has_its_predicted_size(home):
    section = {"METHOD": ["AWQ", "GPTQ"], "W_BIT": [4, 2]}
    checked = check_job(parse_yaml(demo_text(**native(**section))).config, home)
    assert list(checked.predicted) == ["awq-w4-g128", "awq-w2-g128", "gptq-w4-g128", "gptq-w2-g128"]
    sizes = list(checked.predicted.values())
    assert sizes[0] == sizes[2] == checked.predicted_bytes > sizes[1] == sizes[3]


def test_a_packages_result_is_as_large_as_the_cores(home, monkeypatch):
    monkeypatch.setattr("backend.jobs.preflight.engine_for", lambda config: None)  # autoawq need not be installed

    def sizes(algorithm, **section):
        text = demo_text(ALGORITHM=algorithm, llm={algorithm: section})
        return check_job(parse_yaml(text).config, home).predicted

    assert sizes("AutoAWQ", ENGINE="autoawq") == sizes("AutoAWQ") != {}
    assert sizes("LLMCompressor") == sizes("LLMCompressor", ENGINE="native") != {}
    assert sizes("LLMCompressor", RECIPE="RTN", SCHEME="FP8_DYNAMIC") == {}


@pytest.mark.parametrize(
    ("section", "key", "says"),
    [
        ({"KEEP": ["proj"]}, "KEEP", "nothing would be quantized: all 21 Linears"),
        ({"OVERRIDES": [{"PATTERN": "*", "KEEP": True}]}, "OVERRIDES", "nothing would be quantized"),
        ({"OVERRIDES": [{"PATTERN": "*.c_proj", "W_BIT": 8}]}, "OVERRIDES.0.PATTERN", "matches no Linear; this model"),
    ],
)
def test_a_recipe_that_does_nothing_is_refused(home, section, key, says):
    assert says in problems(home, **native(**section))[f"llm.Native.{key}"]


@pytest.mark.parametrize(
    ("algorithm", "section", "told"),
    [
        ("AutoAWQ", {"W_BIT": [4, 3]}, True),
        ("AutoAWQ", {"W_BIT": [4, 8]}, False),
        ("Native", {"METHOD": ["RTN", "GPTQ", "AWQ+GPTQ"], "W_BIT": 2}, False),
        ("Native", {"METHOD": ["GPTQ", "AWQ"], "W_BIT": 2}, True),
        ("LLMCompressor", {"RECIPE": "AWQ", "SCHEME": "W3A16"}, True),
        ("LLMCompressor", {"RECIPE": "GPTQ", "SCHEME": "W3A16"}, False),
    ],
)
def test_awq_below_4_bits_is_advised_against(home, algorithm, section, told):
    checked = check_job(parse_yaml(demo_text(ALGORITHM=algorithm, llm={algorithm: section})).config, home)
    assert any("AWQ alone hardly beats" in note for note in checked.notes) == told


def test_a_full_disk_is_told_with_what_is_needed_and_free(home, monkeypatch):
    monkeypatch.setattr("backend.jobs.room.free_bytes", lambda path: 1_000_000)
    message = problems(home, **native(W_BIT=[4, 3]))["USER_FOLDER"]
    assert "its 2 results need up to" in message and "1 MB free" in message


def test_an_engine_that_is_not_installed_is_told_at_its_key(home, monkeypatch, tmp_path):
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path / "none"))
    message = problems(home, llm={"AutoAWQ": {"ENGINE": "autoawq"}})["llm.AutoAWQ.ENGINE"]
    assert "python -m backend engines install autoawq" in message


def test_what_a_package_cannot_do_with_the_model_is_told_at_its_key(home, tmp_path):
    model = str(narrow_model(tmp_path / "m"))
    section = {"LLMCompressor": {"RECIPE": "GPTQ", "SCHEME": "W4A16"}}
    found = problems(home, MODEL=model, ALGORITHM="LLMCompressor", llm=section)
    assert "GROUP_SIZE" in found["llm.LLMCompressor.GROUP_SIZE"]
    found = problems(home, MODEL=model, llm={"AutoAWQ": {"ENGINE": "autoawq"}})
    assert "128" in found["llm.AutoAWQ.Q_GROUP_SIZE"]


def test_conversations_need_a_chat_template(home, tmp_path):
    rows = [{"text": [{"role": "user", "content": "one two three four five six seven eight nine ten " * 5}]}] * 3
    path = write_jsonl(tmp_path / "chat.jsonl", rows)
    calibration = {"PACKING": "sample", "SEQUENCE_LENGTH": 16}
    config = parse_yaml(demo_text(DATA_PATH=str(path), CALIBRATION=calibration)).config
    assert any("makes 3 sequences" in note for note in check_job(config, home).notes)
    model = copy_model(tmp_path / "m")
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (model / name).unlink()
    found = problems(home, MODEL=str(model), DATA_PATH=str(path), CALIBRATION=calibration)
    assert "needs a chat template" in found["TEXT_COLUMN"]


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
    for name in ("autoawq_demo", "native_demo"):
        assert main(["validate", f"examples/{name}.yaml", "--home", str(home.root)]) == 0


def write_headers(folder: Path, config: dict, shapes: dict) -> Path:
    """A model folder with zeros of the given shapes."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["model.layers", "model.decoder.layers", "decoder.layers", "gpt_neox.layers"])
def test_layers_are_found_under_every_supported_name(tmp_path, prefix):
    shapes = {f"{prefix}.{i}.{n}.weight": (64, 128) for i in (0, 1) for n in ("fc1", "attention.dense")}
    shapes |= {f"{prefix}.0.norm.weight": (128,), "model.embed_tokens.weight": (64, 128), "lm_head.weight": (64, 128)}
    config = {"architectures": ["X"], "num_hidden_layers": 2, "tie_word_embeddings": True}
    facts = quick_check(write_headers(tmp_path / "m", config, shapes))
    assert len(facts.linears) == 4 and facts.linears[f"{prefix}.1.fc1"] == (64, 128)
    assert "lm_head.weight" not in {t.name for t in facts.headers}


def test_an_incomplete_model_and_other_kinds_are_refused(tmp_path):
    shapes = {"model.layers.0.fc1.weight": (64, 128)}
    for number, (change, says) in enumerate(
        [
            ({"num_hidden_layers": 2}, "1 decoder layers; config.json says 2"),
            ({"is_encoder_decoder": True}, "encoder-decoder"),
            ({"num_local_experts": 8}, "mixture of experts"),
            ({"quantization_config": {"quant_method": "awq"}}, "quantized already"),
        ]
    ):
        with pytest.raises(ModelError, match=says):
            quick_check(write_headers(tmp_path / str(number), {"architectures": ["X"], **change}, shapes))


DO = {"give", "choose", "use", "set", "get", "write", "save", "run", "check", "free", "make", "supported"}
"""Words of what somebody is told to do."""


def broken_files(folder):
    for name, content in (
        ("latin.txt", b"caf\xe9"), ("lines.jsonl", b"no json"), ("list.jsonl", b"[1]"), ("empty.jsonl", b""),
        ("table.parquet", b"none"), ("other.jsonl", b'{"words": "x"}'), ("short.jsonl", b'{"text": "x"}'),
    ):  # fmt: skip
        (folder / name).write_bytes(content)
        yield {"DATA_PATH": str(folder / name)}
    (folder / "folder").mkdir()
    yield {"DATA_PATH": str(folder / "folder")}


def test_every_refusal_says_what_to_do(home, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    experts = copy_model(tmp_path / "experts", num_local_experts=8)
    cut = copy_model(tmp_path / "cut")
    (cut / "model.safetensors").write_bytes(b"x" * 40)
    narrow = narrow_model(tmp_path / "narrow")
    monkeypatch.setenv("QUANTDECK_ENVIRONMENTS", str(tmp_path / "none"))
    cases = [
        *broken_files(tmp_path / "data"),
        {"MODEL": str(experts)}, {"MODEL": str(cut)}, {"MODEL": str(narrow)}, {"MODEL": "/none"}, {"MODEL": "a b"},
        {"SPLIT": "none"}, {"llm": {"AutoAWQ": {"ENGINE": "autoawq"}}}, {"DATASET_NAME": "json"},
        {"TRUST_REMOTE_CODE": True},
    ]  # fmt: skip
    for changes in cases:
        for key, message in problems(home, **changes).items():
            assert set(re.findall("[a-z]+", message.lower())) & DO, f"{changes}, {key}: {message}"
