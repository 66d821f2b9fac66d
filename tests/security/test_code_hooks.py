"""Code hooks in the JSON files of a model, its chat template and its tasks: nothing of theirs runs.

The payloads are real: each would leave a canary file behind if anything opened it carelessly.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from backend.engines.llm_problems import check_llm
from backend.errors import CheckpointError, ConfigErrors, DataError, ModelError
from backend.evaluate.loading import open_model
from backend.evaluate.tasks import check_tasks
from backend.formats.config import SIDE_FILES, read_config_json
from backend.formats.headers import SINGLE_FILE, read_headers
from backend.formats.loader import load_model, load_tokenizer
from backend.formats.skeleton import read_config
from backend.jobs.preflight import check_job
from backend.paths import PROJECT, Home
from backend.schema.llmcompressor import LLMCompressorSettings
from backend.sources.messages import row_encoder
from backend.sources.models import model_facts
from backend.sources.prepare import _tokenizer
from backend.sources.quick_check import quick_check
from tests.security.folders import NATIVE, change, job

# -- code hooks in JSON files


HOOKS: list[dict[str, Any]] = [
    {
        "auto_map": {
            "AutoConfig": "evil.Config",
            "AutoModelForCausalLM": "evil.Model",
            "AutoTokenizer": ["evil.T", None],
        }
    },
    {"auto_map": {"AutoModelForCausalLM": "evil-org/repo--evil.Model"}},
    {"_attn_implementation_internal": "evil-org/kernel"},
    {"_experts_implementation_internal": "evil-org/kernel"},
    {"_attn_implementation": "evil-org/kernel:run"},
    {"attn_implementation": {"": "evil-org/kernel"}},
    {"_experts_implementation": "evil-org/kernel"},
    {"custom_pipelines": {"text-generation": {"impl": "evil.Pipeline"}}},
    {"code_revision": "main"},
    {"trust_remote_code": True},
    {"custom_code": "evil.py"},
    {"kernel_config": {"kernel_mapping": {"RMSNorm": "evil-org/kernel:RMSNorm"}}},
    {"use_kernels": True},
    {"configuration_files": ["config.4.0.0.json"]},
    {"transformers_weights": "adapter_model.bin"},
]
LOADERS = {
    "facts": quick_check,
    "config": read_config,
    "model": load_model,
    "tokenizer": load_tokenizer,
    "evaluate and chat": open_model,
    "prepare": _tokenizer,
    "llmcompressor": lambda folder: check_llm(folder, LLMCompressorSettings()),
}


def spoil(folder: Path, canary: Path) -> None:
    """Code beside the weights, as hooks would name it."""
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Config: pass\nModel = T = Config\n")
    change(folder / "config.4.0.0.json", **json.loads((folder / "config.json").read_text()), **HOOKS[2])


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: next(iter(hook)))
@pytest.mark.parametrize("nested", [False, True], ids=["top", "nested"])
def test_code_hooks_in_config_json_are_refused(model: Path, canary: Path, hook: dict[str, Any], nested: bool) -> None:
    spoil(model, canary)
    change(model / "config.json", **({"text_config": {"layers": [{"deep": hook}]}} if nested else hook))
    key = next(iter(hook))
    for name, load in LOADERS.items():
        with pytest.raises(ModelError) as caught:
            load(model)
        assert f"{model}/config.json sets {key}" in caught.value.message, name
    assert not canary.exists()


@pytest.mark.parametrize("file", SIDE_FILES)
def test_code_hooks_in_the_other_files_are_refused(model: Path, canary: Path, file: str) -> None:
    spoil(model, canary)
    change(model / file, **HOOKS[0])
    for name, load in LOADERS.items():
        with pytest.raises(ModelError) as caught:
            load(model)
        assert f"{file} sets auto_map" in caught.value.message, name
    assert not canary.exists()


def test_the_hook_of_the_tests_is_a_real_one(model: Path, canary: Path) -> None:
    """With remote code on, transformers runs the payload: the tests above refuse something that works."""
    spoil(model, canary)
    change(model / "config.json", **HOOKS[0])
    code = f"from transformers import AutoConfig\nAutoConfig.from_pretrained({str(model)!r}, trust_remote_code=True)\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(model.parent / "modules"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=300)
    assert canary.exists()


def test_what_models_have_by_right_is_no_hook(model: Path) -> None:
    change(
        model / "config.json", _attn_implementation="sdpa", attn_implementation=None, trust_remote_code=False,
        task_specific_params={"code": {"max_length": 3}}, language_code="en", code_vocab_size=3,
    )  # fmt: skip
    change(model / "tokenizer_config.json", chat_template="{{ messages }}", src_lang_code="en")
    (model / "added_tokens.json").write_text('{"auto_map": 7}')  # tokens may be called anything
    read_config_json(model)


def test_an_adapter_would_load_another_model_and_is_refused(model: Path) -> None:
    (model / "adapter_config.json").write_text('{"base_model_name_or_path": "evil-org/base"}')
    for load in LOADERS.values():
        with pytest.raises(ModelError, match="adapter_config.json: it is an adapter"):
            load(model)


def test_no_program_asks_transformers_for_remote_code_but_by_the_one_switch() -> None:
    found = []
    for path in sorted([*(PROJECT / "backend").rglob("*.py"), *(PROJECT / "ui").rglob("*.py")]):
        text = path.read_text(encoding="utf-8")
        if "trust_remote_code=True" in text or '"trust_remote_code": True' in text:
            found.append(path.name)
        calls = text.count(".from_pretrained(") - text.count("GenerationConfig.from_pretrained(")
        calls += text.count("AutoModelForCausalLM.from_config(")
        said = text.count("trust_remote_code=False") + text.count("trust_remote_code=remote_code_allowed()")
        shown = path.name == "loadways.py"  # commands that people run elsewhere, with transformers' own default
        if path.parent.name != "demo" and not shown and said < calls:
            found.append(f"{path.name}: a load that does not say whether it runs remote code")
        if "torch.load(" in text and text.count("weights_only=True") < text.count("torch.load("):
            found.append(f"{path.name}: torch.load without weights_only")
        for banned in ("pickle.load", "joblib", "eval(", "yaml.load(", "yaml.unsafe_load", "shell=True", "os.system("):
            if f" {banned}" in text or f"({banned}" in text:
                found.append(f"{path.name}: {banned}")
    assert found == []


@pytest.mark.parametrize("content", ["", "[", "[1]", "3", "[" * 200_000, '{"a": ' * 100_000, "\ufeffnull"])
def test_broken_json_is_named(model: Path, content: str) -> None:
    (model / "config.json").write_text(content)
    with pytest.raises(ModelError, match="config.json"):
        read_config_json(model)


@pytest.mark.parametrize("value", [-1, "x", {"a": 1}, [None], [[]]])
def test_architectures_of_a_wrong_kind_are_named(home: Home, model: Path, value: Any) -> None:
    change(model / "config.json", architectures=value)
    with pytest.raises(ConfigErrors, match="architectures"):
        check_job(job(model, **NATIVE), home)
    with pytest.raises(ModelError, match="architectures"):
        load_model(model)


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"])
@pytest.mark.parametrize("value", ["x", [[]], 1e308, True, {}, None])
def test_numbers_of_a_wrong_kind_break_no_page(model: Path, key: str, value: Any) -> None:
    change(model / "config.json", **{key: value})
    facts = model_facts(model)
    assert 0 in (facts.layers, facts.hidden_size, facts.intermediate_size, facts.vocab_size)


@pytest.mark.parametrize("content", [b"[", b"[]", b"{}", b"3", b"\xff", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_is_named(home: Home, model: Path, content: bytes) -> None:
    (model / "tokenizer.json").write_bytes(content)
    for load in (load_tokenizer, _tokenizer):
        with pytest.raises(ModelError, match="tokenizer"):
            load(model)
    with pytest.raises(ConfigErrors, match="tokenizer.json is broken"):
        check_job(job(model, **NATIVE), home)


@pytest.mark.parametrize("content", [b"[", b"3", b'{"temperature": "hot"}', b'{"eos_token_id": {}}'])
def test_broken_generation_settings_are_named(model: Path, content: bytes) -> None:
    (model / "generation_config.json").write_bytes(content)
    try:
        load_model(model)
    except ModelError as error:
        assert "generation_config.json" in error.message


def test_files_that_never_end_are_refused(model: Path) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        path = model / name
        kept = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(ModelError, match=f"{name} is not readable.*not a regular file"):
            read_config_json(model)
        path.unlink()
        path.symlink_to("/dev/zero")
        with pytest.raises(ModelError, match=f"{name} is not readable.*not a regular file"):
            read_config_json(model)
        path.unlink()
        with open(path, "wb") as file:
            file.truncate(2**40)  # sparse
        with pytest.raises(ModelError, match="more than"):
            read_config_json(model)
        path.unlink()
        path.write_bytes(kept)
    (model / SINGLE_FILE).unlink()
    (model / SINGLE_FILE).symlink_to("/dev/zero")
    with pytest.raises(CheckpointError):
        read_headers(model)


# -- chat templates and tasks


ATTACKS = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ (messages|attr('__class__'))|attr('__mro__') }}",
    "{{ raise_exception.__globals__['sys'].modules['os'].system('touch CANARY') }}",
    "{{ strftime_now.__globals__ }}",
    "{% set _ = messages.append({'role': 'x'}) %}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}{{ os.system('touch CANARY') }}",
    "{% for i in range(99999999) %}x{% endfor %}",
    "{{ unfinished",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_chat_templates_stay_in_their_sandbox(model: Path, canary: Path, attack: str) -> None:
    template = attack.replace("CANARY", str(canary))
    change(model / "tokenizer_config.json", chat_template=template)
    for name in ("chat_template.jinja", "chat_template.json"):
        (model / name).unlink(missing_ok=True)
    tokenizer = load_tokenizer(model)
    messages = [{"role": "user", "content": "hello"}]
    from backend.chat.prompt import encode_messages

    texts = []
    for run in (lambda: row_encoder(tokenizer, "auto")([messages]), lambda: encode_messages(tokenizer, messages)):
        try:
            texts.append(str(run()))
        except DataError as error:
            assert "chat template" in error.message
    assert not canary.exists()
    assert not [text for text in texts if text not in ("[[]]", "Prompt(ids=[], stop='')")], "something came out"


@pytest.mark.parametrize("name", ["../x.yaml", "/tmp/x", "x.yaml", "a/b", "--include_path=/tmp", "", "arc_easy\n", "é"])
def test_only_built_in_tasks_are_run(name: str) -> None:
    with pytest.raises(Exception, match="task name") as caught:
        check_tasks([name])
    assert type(caught.value).__name__ == "ConfigError"
