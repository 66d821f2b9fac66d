"""Engine autoawq: our checks in front of the package, and, where it is installed, the package itself."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from backend.engines.autoawq_checks import MODEL_TYPES, autoawq_problems
from backend.engines.autoawq_package import compute_dtype, read_tokens
from backend.engines.environments import environment_python, environment_variables, missing_reason
from backend.errors import DataError
from backend.files import write_json
from backend.formats.headers import TensorInfo, read_headers
from backend.formats.loader import load_model
from backend.formats.size import is_layer_linear
from backend.formats.weight import QuantizedWeight
from backend.formats.writer import CheckpointWriter
from backend.paths import PROJECT

SETTINGS: dict[str, Any] = {
    "W_BIT": 4, "Q_GROUP_SIZE": 32, "ZERO_POINT": True, "VERSION": "GEMM", "dtype": "float16",
}  # fmt: skip
VOCABULARY = 96
installed = pytest.mark.skipif(environment_python("autoawq") is None, reason=str(missing_reason("autoawq")))


def make_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """A random model with uneven norms, so that a wrong fold shows; with a chat template and generation settings."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": kind.startswith("gemma"),
    }  # fmt: skip
    config = transformers.AutoConfig.for_model(kind, **(sizes | changes))
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(0.0 if kind.startswith("gemma") else 1.0, 0.3)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, 0.04)
    model.to(dtype).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "max_new_tokens": 7})
    return folder


def write_request(folder: Path, model: Path, *settings: dict[str, Any]) -> Path:
    """A request for the stage program, with 4 x 32 random tokens."""
    tokens = torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(1))
    folder.mkdir(exist_ok=True)
    save_file({"tokens": tokens}, str(folder / "tokens.safetensors"))
    request = {
        "model_dir": str(model), "tokens_file": str(folder / "tokens.safetensors"), "out_dir": str(folder / "out"),
        "device": "cpu", "checkpoint_dir": str(folder / "checkpoint"), "seed": 0,
        "configurations": [{"name": f"c{i}", "label": f"c{i}", "settings": s} for i, s in enumerate(settings)],
    }  # fmt: skip
    write_json(folder / "request.json", request)
    return folder


def in_environment(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a module with the environment's interpreter, as the runner does."""
    return subprocess.run(
        [str(environment_python("autoawq")), "-m", *map(str, arguments)],
        cwd=PROJECT, capture_output=True, text=True, timeout=500,
        env={**environment_variables("autoawq"), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
    )  # fmt: skip


def quantize(folder: Path, model: Path, *settings: dict[str, Any]) -> Any:
    """Run the stage program; returns (exit code, events, result, log)."""
    write_request(folder, model, *settings)
    done = in_environment("backend.engines.autoawq_package", folder / "request.json", folder / "result.json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    result = json.loads((folder / "result.json").read_text()) if done.returncode == 0 else None
    return done.returncode, events, result, done.stderr


def relative_error(model: Path, quantized: Path) -> float:
    tokens = torch.randint(0, VOCABULARY, (2, 32), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = (load_model(f, dtype=torch.float32)(tokens).logits for f in (model, quantized))
    return float((found - expected).norm() / expected.norm())


# What can be said before the package runs


def linears(**shapes: tuple[int, int]) -> list[TensorInfo]:
    return [TensorInfo(f"model.layers.0.{n}.weight", "BF16", s, "f", 2 * s[0] * s[1]) for n, s in shapes.items()]


GOOD = linears(q_proj=(96, 128), down_proj=(128, 256))


@pytest.mark.parametrize(
    ("changes", "key", "says"),
    [
        ({"W_BIT": 3}, "W_BIT", "found 3; the autoawq package takes 4. Use ENGINE: native"),
        ({"W_BIT": [4, 8]}, "W_BIT", "found 8"),
        ({"Q_GROUP_SIZE": 16}, "Q_GROUP_SIZE", "takes 32, 64, 128"),
        ({"W_BIT": True}, "W_BIT", "found True"),
        ({"Q_GROUP_SIZE": -1}, "Q_GROUP_SIZE", "found -1"),
        ({"ZERO_POINT": False}, "ZERO_POINT", "takes True.*native"),
        ({"VERSION": "MARLIN"}, "VERSION", "takes GEMM, GEMV"),
        ({"Q_GROUP_SIZE": [64, 96]}, "Q_GROUP_SIZE", "found 96"),
    ],
)
def test_settings_that_the_package_does_not_know(changes: dict[str, Any], key: str, says: str) -> None:
    (problem,) = autoawq_problems(GOOD, SETTINGS | changes)
    assert problem.key == key
    assert pytest.raises(type(problem), match=says).matches(problem)


@pytest.mark.parametrize(
    ("headers", "changes", "key", "says"),
    [
        (linears(q_proj=(128, 96)), {"Q_GROUP_SIZE": 64}, "Q_GROUP_SIZE", "64 does not divide the 96 inputs of model"),
        (linears(q_proj=(40, 128)), {}, "ENGINE", "multiple of 32 outputs; model.layers.0.q_proj has 40"),
        (linears(up_proj=(96, 128)), {}, "ENGINE", "multiple of 64 outputs; model.layers.0.up_proj has 96"),
        (linears(k_proj=(20, 128)), {"VERSION": "GEMV"}, "ENGINE", "multiple of 8 outputs"),
    ],
)  # fmt: skip
def test_widths_that_it_cannot_take(headers: Any, changes: dict[str, Any], key: str, says: str) -> None:
    (problem,) = autoawq_problems(headers, SETTINGS | changes)
    assert problem.key == key
    assert says in problem.message


def test_each_problem_is_told_once_and_a_good_job_has_none() -> None:
    many = linears(**{f"up_proj{i}": (96, 96) for i in range(9)})
    problems = autoawq_problems(many, SETTINGS | {"Q_GROUP_SIZE": [64, 128]})
    assert [p.key for p in problems] == ["Q_GROUP_SIZE", "Q_GROUP_SIZE", "ENGINE"]
    assert autoawq_problems(GOOD, SETTINGS | {"Q_GROUP_SIZE": [32, 64, 128]}, {"model_type": "llama"}) == []
    assert autoawq_problems(linears(q_proj=(40, 128)), SETTINGS | {"VERSION": "GEMV"}) == []


def test_other_architectures_are_refused() -> None:
    (problem,) = autoawq_problems(GOOD, SETTINGS, {"model_type": "phi3"})
    assert problem.key == "ENGINE"
    assert "this one is phi3" in problem.message


@pytest.mark.parametrize(
    ("stored", "device", "computed"),
    [
        ("BF16", "cpu", "bfloat16"),
        ("F16", "cpu", "float32"),
        ("F32", "cpu", "float32"),
        ("F16", "cuda:0", "float16"),
        ("BF16", "cuda:0", "bfloat16"),
    ],
)
def test_computed_in_no_narrower_type_than_the_source(stored: str, device: str, computed: str) -> None:
    headers = [TensorInfo("model.layers.0.q_proj.weight", stored, (8, 8), "f", 128)]
    assert compute_dtype([*headers, TensorInfo("lm_head.weight", "F32", (8, 8), "f", 256)], device) == computed


def test_padding_is_cut_off_before_the_package_joins_the_sequences(tmp_path: Path) -> None:
    tokens = torch.arange(12).view(3, 4)
    save_file({"tokens": tokens, "lengths": torch.tensor([2, 0, 4])}, str(tmp_path / "t"))
    assert read_tokens(tmp_path / "t") == ([[0, 1], [8, 9, 10, 11]], 4)
    save_file({"tokens": tokens, "lengths": torch.tensor([1, 0, 2])}, str(tmp_path / "t"))
    with pytest.raises(DataError, match="3 tokens; the autoawq package needs 4"):
        read_tokens(tmp_path / "t")


def test_the_program_needs_nothing_that_its_environment_lacks() -> None:
    blocked = ("gradio", "lm_eval", "psutil", "sqlite_utils", "ruamel", "compressed_tensors", "llmcompressor", "pynvml")
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked!r})); import backend.engines.autoawq_package"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


# The package itself


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every architecture on the list, quantized: <kind>/model, <kind>/job."""
    root = tmp_path_factory.mktemp("architectures")
    jobs = [
        write_request(root / kind / "job", make_model(root / kind / "model", kind), SETTINGS) for kind in MODEL_TYPES
    ]
    done = in_environment("tests.engines.autoawq_runs", *jobs)
    assert done.returncode == 0, done.stderr
    return root


@installed
@pytest.mark.peer
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_every_architecture_on_the_list_comes_back_from_disk(architectures: Path, kind: str) -> None:
    model, job = architectures / kind / "model", architectures / kind / "job"
    events = [json.loads(line) for line in (job / "events.jsonl").read_text().splitlines()]
    result = json.loads((job / "result.json").read_text())
    assert [(e["step"], e["total"], e["layer"]) for e in events if "layer" in e] == [
        (1, 2, "model.layers.0"),
        (2, 2, "model.layers.1"),
    ]
    assert result["tokens"] == 4 * 32
    assert set(result["timings"]) == {"calibrate", "quantize", "save"}
    assert list(result["results"][0]["skipped"]) == ["lm_head"]
    assert result["results"][0]["notes"][0].startswith("quantized by autoawq 0.2.9, torch 2.13")
    assert result["results"][0]["notes"][0].endswith("; computed in bfloat16")

    out = job / "out" / "c0"
    assert relative_error(model, out) < 0.3
    source, saved = (json.loads((folder / "config.json").read_text()) for folder in (model, out))
    assert saved.pop("quantization_config") == {
        "bits": 4, "group_size": 32, "modules_to_not_convert": None, "quant_method": "awq", "version": "gemm",
        "zero_point": True,
    }  # fmt: skip
    assert saved == source | {"dtype": "float16"}
    for name in ("generation_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (model / name).read_bytes()
    assert {t.dtype for t in read_headers(out)} == {"F16", "I32"}
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1, "whoever may read one file may read all"


@installed
@pytest.mark.peer
def test_several_configurations_and_a_resumed_job(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", num_key_value_heads=2, attention_bias=True)
    both = (SETTINGS, SETTINGS | {"Q_GROUP_SIZE": 64, "VERSION": "GEMV", "dtype": "bfloat16"})
    code, events, result, log = quantize(tmp_path / "job", model, *both)
    assert code == 0, log
    steps = [(e["configuration"], e["step"], e["total"]) for e in events if "layer" in e]
    assert steps == [("c0", 1, 4), ("c0", 2, 4), ("c1", 3, 4), ("c1", 4, 4)]
    outs = [tmp_path / "job" / "out" / name for name in ("c0", "c1")]
    assert [r["name"] for r in result["results"]] == ["c0", "c1"]
    assert all(relative_error(model, out) < 0.35 for out in outs)
    assert {t.dtype for t in read_headers(outs[1])} == {"BF16", "F16", "I32"}

    before = [(out / "model.safetensors").read_bytes() for out in outs]
    stamp = (outs[0] / "model.safetensors").stat().st_mtime_ns
    (outs[1] / "config.json").unlink()
    code, events, again, log = quantize(tmp_path / "job", model, *both)
    assert code == 0, log
    assert {e["configuration"] for e in events if "layer" in e} == {"c1"}, "what was finished is kept"
    assert (outs[0] / "model.safetensors").stat().st_mtime_ns == stamp
    assert [(out / "model.safetensors").read_bytes() for out in outs] == before
    assert again["results"] == result["results"]


@installed
@pytest.mark.peer
def test_failures_name_the_layer_or_the_setting(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    code, events, _, _ = quantize(tmp_path / "settings", model, SETTINGS | {"W_BIT": 3})
    assert (code, events[-1]["stage"]) == (2, "error")
    assert events[-1]["message"].startswith("W_BIT: found 3")

    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(weights, str(model / "model.safetensors"), {"format": "pt"})
    code, events, _, _ = quantize(tmp_path / "nan", model, SETTINGS)
    assert code == 1
    assert "stopped in model.layers.1 (AssertionError without a message)" in events[-1]["message"]


def write_random(folder: Path, source: Path, layout: str, group_size: int) -> dict[str, QuantizedWeight]:
    """Our checkpoint of random codes, zeros and scales for every Linear of the decoder layers."""
    writer = CheckpointWriter(folder, source, layout=layout)
    random = torch.Generator().manual_seed(group_size)
    weights = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not is_layer_linear(name, tuple(tensor.shape)):
            writer.add(name, tensor)
            continue
        prefix = name.removesuffix(".weight")
        out, width = tensor.shape
        groups = (out, width // group_size)
        weights[prefix] = QuantizedWeight(
            q=torch.randint(0, 16, (out, width), generator=random, dtype=torch.uint8),
            scale=(torch.rand(groups, generator=random) * 0.02 + 1e-3).half(),
            zero=torch.randint(0, 16, groups, generator=random, dtype=torch.uint8),
        )
        writer.add_linear(prefix, weights[prefix])
    writer.finish({"lm_head": "stays"})
    return weights


@installed
@pytest.mark.peer
def test_its_own_code_reads_our_checkpoints_bit_for_bit(tmp_path: Path) -> None:
    source = make_model(tmp_path / "model", hidden_size=256, intermediate_size=384, num_hidden_layers=1, head_dim=64)
    written = {
        tmp_path / f"{layout}-{group_size}": (layout, group_size)
        for layout in ("autoawq-gemm", "autoawq-gemv")
        for group_size in (32, 64, 128)
    }
    weights = {folder: write_random(folder, source, *how) for folder, how in written.items()}
    done = in_environment("tests.engines.autoawq_reader", *written)
    assert done.returncode == 0, done.stderr
    for folder, linears in weights.items():
        theirs, ours = load_file(folder / "read.safetensors"), load_file(folder / "model.safetensors")
        assert len(linears) == 7
        for prefix, weight in linears.items():
            where = f"{folder.name}: {prefix}"
            assert torch.equal(theirs[f"{prefix}.weight"], weight.dequantize(torch.float16)), where
            for kind in ("qweight", "qzeros", "scales"):
                assert torch.equal(theirs[f"{prefix}.{kind}"], ours[f"{prefix}.{kind}"]), f"{where}.{kind}"
