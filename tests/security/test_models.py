"""Hostile model folders: nothing of theirs runs, and every refusal names the file and the reason.

The payloads are real: each would leave a canary file behind if anything opened it carelessly.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from backend.demo import MODEL_DIR
from backend.engines.llm_problems import check_llm
from backend.errors import CheckpointError, ConfigErrors, DataError, ModelError
from backend.evaluate.loading import open_model
from backend.evaluate.tasks import check_tasks
from backend.event_stream import EventWriter
from backend.formats.config import SIDE_FILES, read_config_json
from backend.formats.headers import INDEX_FILE, SINGLE_FILE, read_headers
from backend.formats.loader import load_model, load_tokenizer
from backend.formats.skeleton import read_config
from backend.jobs.preflight import check_job
from backend.paths import PROJECT, Home
from backend.schema import parse_yaml
from backend.schema.llmcompressor import LLMCompressorSettings
from backend.settings import FILE_NAME
from backend.sources import pickles
from backend.sources.messages import row_encoder
from backend.sources.models import model_facts
from backend.sources.pickles import convert
from backend.sources.prepare import _tokenizer, prepare
from backend.sources.quick_check import quick_check
from tests.conftest import demo_text
from tests.formats.models import make_model

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a tokenizer."""
    folder = make_model(tmp_path_factory.mktemp("models") / "model")
    for name in TOKENIZER_FILES:
        shutil.copyfile(MODEL_DIR / name, folder / name)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path) -> Path:
    """A copy of it that may be spoilt."""
    return shutil.copytree(pristine, tmp_path / "model")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A file that only a payload makes."""
    return tmp_path / "canary"


def change(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | changes))


def quiet() -> EventWriter:
    return EventWriter(open(os.devnull, "w"))  # noqa: SIM115


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
        if path.parent.name != "demo" and said < calls:
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


# -- pickles


class Payload:
    """Unpickling it makes the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def as_pickle(folder: Path, name: str = "pytorch_model.bin") -> dict[str, torch.Tensor]:
    """Turn a model's safetensors into an honest pickle."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    torch.save(tensors, folder / name)
    return tensors


def allow(home: Home) -> None:
    home.root.mkdir(parents=True, exist_ok=True)
    (home.root / FILE_NAME).write_text("[models]\nallow_pickle = true\n")


def job(model: Path, **changes: Any) -> Any:
    return parse_yaml(demo_text(CUSTOM_MODEL_PATH=str(model), **changes)).config


NATIVE = {
    "ALGORITHM": "Native",
    "llm": {"Native": {"Q_GROUP_SIZE": 32}},
    "CALIBRATION": {"SAMPLES": 2, "SEQUENCE_LENGTH": 32},
    "EVALUATION": {"ENABLED": False},
    "BENCHMARK": {"ENABLED": False},
}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "weights.PKL", "w.npy"])
def test_a_pickle_is_refused_and_never_opened(home: Home, model: Path, canary: Path, name: str) -> None:
    (model / SINGLE_FILE).unlink()
    (model / name).write_bytes(pickle.dumps(Payload(canary)))
    for load in (read_headers, quick_check, load_model, open_model):
        with pytest.raises(CheckpointError, match="only as pickle"):
            load(model)
    with pytest.raises(ConfigErrors, match="only as pickle"):
        check_job(job(model, **NATIVE), home)
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    with pytest.raises(CheckpointError, match="only as pickle"):
        prepare({**request, "out": str(home.root / "out")}, quiet())
    assert not canary.exists()


def test_the_payload_of_the_tests_works(tmp_path: Path, canary: Path) -> None:
    pickle.loads(pickle.dumps(Payload(canary)))
    assert canary.exists()


def test_pickles_beside_safetensors_are_left_alone(home: Home, model: Path, canary: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Payload(canary)))
    allow(home)
    check_job(job(model, **NATIVE), home)
    open_model(model)
    assert not canary.exists()


def test_where_allowed_an_honest_pickle_becomes_safetensors(home: Home, model: Path) -> None:
    tensors = as_pickle(model)
    allow(home)
    checked = check_job(job(model, **NATIVE), home)
    assert any("converts them first" in note for note in checked.notes)
    assert checked.predicted == {}
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    result = prepare({**request, "out": str(home.root / "out")}, quiet())
    converted = Path(result["model_dir"])
    assert converted == home.root / "out" / "model"
    found = load_file(converted / SINGLE_FILE)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert not [path for path in converted.iterdir() if path.suffix == ".bin"]
    open_model(converted)
    prepare({**request, "out": str(home.root / "out")}, quiet())  # a second attempt starts afresh


def test_shards_and_old_checkpoints_are_converted(model: Path, tmp_path: Path) -> None:
    tensors = as_pickle(model, "x.ckpt")
    torch.save({"state_dict": tensors, "epoch": 3}, model / "x.ckpt")
    (model / "optimizer.pt").write_bytes(b"not a pickle, and not read")
    converted_here(model, tmp_path / "a")
    assert load_file(tmp_path / "a" / SINGLE_FILE).keys() == tensors.keys()

    (model / "x.ckpt").unlink()
    names = sorted(tensors)
    half = {name: f"pytorch_model-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(half.values()):
        torch.save({name: tensors[name] for name in names if half[name] == file}, model / file)
    (model / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": half}))
    converted = convert(model, tmp_path / "b", tmp_path)
    assert {info.name for info in read_headers(converted)} == set(names)
    open_model(converted)

    (model / pickles.PICKLE_INDEX).write_text(json.dumps({"weight_map": {"a": "../../x.bin"}}))
    with pytest.raises(CheckpointError, match="no file of that folder"):
        converted_here(model, tmp_path / "c")


def converted_here(model: Path, out: Path) -> None:
    """What the process of its own does, in this one: starting one takes seconds."""
    shutil.rmtree(out, ignore_errors=True)
    pickles.unpickle({"folder": str(model), "out": str(out)}, quiet())


def refused_content(model: Path, tmp_path: Path, content: Any, says: str) -> None:
    for path in model.glob("*.safetensors"):
        path.unlink()
    torch.save(content, model / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=says) as caught:
        converted_here(model, tmp_path / "out")
    assert "pytorch_model.bin" in caught.value.message


def test_where_allowed_a_payload_still_does_not_run(home: Home, model: Path, tmp_path: Path, canary: Path) -> None:
    allow(home)
    refused_content(model, tmp_path, Payload(canary), "is refused")
    refused_content(model, tmp_path, {"a": torch.ones(2), "b": Payload(canary)}, "is refused")
    refused_content(model, tmp_path, {"state_dict": {"a": Payload(canary)}}, "is refused")
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(CheckpointError, match="is refused"):
        convert(model, tmp_path / "out", tmp_path)
    request = {"home": str(home.root), "config": demo_text(CUSTOM_MODEL_PATH=str(model), **NATIVE)}
    with pytest.raises(CheckpointError, match="is refused"):
        prepare({**request, "out": str(home.root / "out")}, quiet())
    assert not canary.exists()


def test_where_allowed_only_plain_tensors_are_taken(model: Path, tmp_path: Path) -> None:
    refused_content(model, tmp_path, [torch.ones(2)], "table of tensors")
    refused_content(model, tmp_path, {}, "table of tensors")
    refused_content(model, tmp_path, {"a": 3}, "no plain tensor")
    refused_content(model, tmp_path, {3: torch.ones(2)}, "no plain tensor")
    refused_content(model, tmp_path, {"a": torch.eye(3).to_sparse()}, "no plain tensor")
    huge = torch.ones(1).expand(2**40)
    refused_content(model, tmp_path, {"a": huge}, "more data than the file holds")
    one = torch.ones(10_000)
    refused_content(model, tmp_path, {str(i): one for i in range(9)}, "more data than the file holds")
    (model / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut")
    with pytest.raises(CheckpointError, match="is refused: it is broken"):
        converted_here(model, tmp_path / "out")
    with zipfile.ZipFile(model / "pytorch_model.bin", "w") as archive:
        archive.writestr("../../evil", "x")
    with pytest.raises(CheckpointError, match="is refused"):
        converted_here(model, tmp_path / "out")


def test_where_allowed_code_hooks_are_refused_all_the_same(home: Home, model: Path, tmp_path: Path) -> None:
    as_pickle(model)
    change(model / "config.json", **HOOKS[0])
    allow(home)
    with pytest.raises(ConfigErrors, match="auto_map"):
        check_job(job(model, **NATIVE), home)
    with pytest.raises(ModelError, match="auto_map"):
        convert(model, tmp_path / "out", tmp_path)


def test_the_converting_process_sees_no_secrets(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_pickle(model)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "evil"))
    seen: list[dict[str, str]] = []
    real = subprocess.run
    monkeypatch.setattr(
        pickles.subprocess, "run", lambda *a, **k: seen.append(k["env"]) or real(*a, **k)  # type: ignore[func-returns-value]
    )  # fmt: skip
    convert(model, tmp_path / "out", tmp_path)
    assert len(seen) == 1
    assert not {"HF_TOKEN", "PYTHONPATH", "LD_PRELOAD"} & seen[0].keys()


# -- safetensors


def with_header(folder: Path, header: Any, data: int = 0, length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / SINGLE_FILE
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + bytes(data))
    return path


def entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        ({}, 0, 2**63, "truncated"),
        ({}, 0, 2**64 - 1, "truncated"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12, None, "overlaps"),
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)}, 8, None, "overlaps"),
        ({"a": entry("F32", [2], 4, 12)}, 12, None, "hole"),
        ({"a": entry("F32", [4], 0, 16)}, 8, None, "truncated"),
        ({"a": entry("F32", [2**40], 0, 2**42)}, 8, None, "truncated"),
        ({"a": entry("F32", [2**62] * 16, 0, 8)}, 8, None, "needs"),
        ({"a": entry("F32", [2**62] * 200_000, 0, 8)}, 8, None, "has shape"),
        ({"a": entry("F32", [2], 8, 0)}, 8, None, "needs 8"),
        (b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 8]}}', 8, None, "shape"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 8]}}', 8, None, "not JSON"),
        (b'{"a":' * 100_000, 8, None, "not JSON"),
    ],
)
def test_broken_weights_are_refused_without_being_believed(
    home: Home, model: Path, header: Any, data: int, length: int | None, says: str
) -> None:
    with_header(model, header, data, length)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=says) as caught:
        read_headers(model)
    assert SINGLE_FILE in caught.value.message
    assert len(caught.value.message) < 20_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes
    with pytest.raises(ConfigErrors, match=says):
        check_job(job(model, **NATIVE), home)


def test_a_header_as_large_as_the_disk_is_not_read(model: Path) -> None:
    with open(model / SINGLE_FILE, "wb") as file:
        file.write(struct.pack("<Q", 2**39))
        file.truncate(2**40)  # sparse
    with pytest.raises(CheckpointError, match="at most 40000000"):
        read_headers(model)


def test_every_cut_of_a_shard_is_noticed(model: Path) -> None:
    path = model / SINGLE_FILE
    whole = path.read_bytes()
    for end in (0, 1, 7, 8, 9, 100, len(whole) // 3, len(whole) - 1):
        path.write_bytes(whole[:end])
        for load in (read_headers, load_model):
            with pytest.raises(CheckpointError, match=SINGLE_FILE):
                load(model)
    path.write_bytes(whole + b"x")
    with pytest.raises(CheckpointError, match=SINGLE_FILE):
        load_model(model)


def split(folder: Path) -> dict[str, str]:
    """Two shards and their index, in place of the single file."""
    tensors = load_file(folder / SINGLE_FILE)
    (folder / SINGLE_FILE).unlink()
    places = {name: f"s{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in ("s0.safetensors", "s1.safetensors"):
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": places}))
    return places


def test_an_index_that_lies_is_refused(model: Path, tmp_path: Path) -> None:
    places = split(model)
    load_model(model)
    name = next(iter(places))

    def refused(weight_map: Any, says: str) -> None:
        (model / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
        for load in (read_headers, load_model):
            with pytest.raises(CheckpointError, match=says):
                load(model)

    shutil.copyfile(model / "s0.safetensors", tmp_path / "outside.safetensors")
    for outside in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/../s0.safetensors", "..", ""):
        refused(places | {name: outside}, "same folder")
    refused(places | {name: "s0.bin"}, "same folder")
    refused(places | {name: ["s0.safetensors"]}, "not a shard index")
    refused(places | {name: "s2.safetensors"}, "s2.safetensors.*missing")
    refused(places | {name: "s1.safetensors" if places[name] == "s0.safetensors" else "s0.safetensors"}, "it is in s")
    refused(places | {"model.extra.weight": "s0.safetensors"}, "no shard has it")
    (model / INDEX_FILE).write_text(
        json.dumps({"weight_map": {k: v for k, v in places.items() if v == "s0.safetensors"}})
    )
    with pytest.raises(CheckpointError, match="in none of its files"):
        load_model(model)
    (model / "s1.safetensors").unlink()
    os.mkfifo(model / "s1.safetensors")
    refused(places, "s1.safetensors.*missing")


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
