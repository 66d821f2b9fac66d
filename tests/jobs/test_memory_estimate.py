"""The memory that is told before a job starts, beside peaks that were measured: published ones, and one of today."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from backend.demo import MODEL_DIR
from backend.engines.configurations import configurations
from backend.formats.headers import TensorInfo
from backend.jobs import machine_memory, memory_estimate
from backend.jobs.memory_estimate import memory_needs
from backend.jobs.memory_warnings import memory_warnings
from backend.jobs.preflight import check_job
from backend.paths import PROJECT
from backend.schema import parse_yaml
from backend.sources.quick_check import check_tensors, quick_check
from benchmarks.shapes import MEDIUM, NARROW, WIDE
from tests.conftest import demo_text
from tests.jobs.test_preflight import native

RESULTS = (PROJECT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
GB = 10**9
MEASURE = """
import json, sys
from pathlib import Path
from backend.quantize.recipe import Scheme
from benchmarks.native import quantize
print(quantize(json.loads(sys.argv[1]), [Scheme("GPTQ")], Path(sys.argv[2]))[1].peak_bytes)
"""  # a small process, since a new one starts with the peak of the one that it comes from


def llama(shape, dtype="BF16"):
    """What the headers of a Llama of this shape would tell."""
    h, i, v = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    kv = h // shape["num_attention_heads"] * shape["num_key_value_heads"]
    shapes = {"model.embed_tokens": (v, h), "model.norm": (h,), "lm_head": (v, h)}
    for n in range(shape["num_hidden_layers"]):
        parts = {
            "self_attn.q_proj": (h, h), "self_attn.k_proj": (kv, h), "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, h), "mlp.gate_proj": (i, h), "mlp.up_proj": (i, h), "mlp.down_proj": (h, i),
            "input_layernorm": (h,), "post_attention_layernorm": (h,),
        }  # fmt: skip
        shapes |= {f"model.layers.{n}.{part}": size for part, size in parts.items()}
    size = {"BF16": 2, "F32": 4}[dtype]
    tensors = [TensorInfo(f"{name}.weight", dtype, s, "x", size * torch.Size(s).numel()) for name, s in shapes.items()]
    return check_tensors("m", {"architectures": ["LlamaForCausalLM"], **shape}, tensors)


def needs(facts, device="cpu", samples=8, length=512, **changes):
    calibration = {"CALIBRATION": {"SAMPLES": samples, "SEQUENCE_LENGTH": length}}
    config = parse_yaml(demo_text(**calibration, **changes)).config
    return memory_needs(facts, config, configurations(config, device), device)


def aqlm(**section):
    blocks = {"num_codebooks": 2, "nbits_per_codebook": 8, "val_size": 1, "finetune_max_epochs": 1}
    own = {"calibration_config": blocks, "finetune_config": {"max_epochs": 0}}
    return {"ALGORITHM": "AQLM", "llm": {"AQLM": {**own, **section}}}


def settings_of(method):
    return aqlm() if method.startswith("AQLM") else native(METHOD=method.split(",")[0])


def published_rows():
    """Of RESULTS.md: model, method, measured peak in bytes."""
    memory = RESULTS.partition("\n## Memory\n")[2].partition("\n## ")[0]
    for line in memory.splitlines():
        if match := re.match(r"\| (\d+) layers, (\d+) wide[^|]*\| ([^|]+) \| \d+ \| [\d.]+ \| (\d+) \|", line):
            layers, wide, method, peak = match.groups()
            shape = {**(WIDE if int(wide) == WIDE["hidden_size"] else NARROW), "num_hidden_layers": int(layers)}
            yield pytest.param(shape, method, int(peak) * 10**6, id=f"{layers}x{wide} {method.split(',')[0]}")


ROWS = list(published_rows())


def test_the_published_table_is_read():
    assert len(ROWS) >= 11


@pytest.mark.parametrize(("shape", "method", "peak"), ROWS)
def test_published_peaks_lie_in_the_range(monkeypatch, shape, method, peak):
    monkeypatch.setattr(memory_estimate, "has_bfloat16", lambda: True)  # of the machine that measured them
    told = needs(llama(shape), **settings_of(method))[0]
    assert told.low <= peak <= told.high
    assert told.high <= 1.7 * told.low  # a range that says something


def test_a_run_of_today_lies_in_the_range(tmp_path):
    torch.manual_seed(0)
    shape = {**NARROW, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 1, "vocab_size": 16000}
    LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    save_file({"tokens": torch.randint(0, 16000, (4, 512))}, str(tmp_path / "tokens.safetensors"))
    inputs = {"model_dir": str(tmp_path / "m"), "tokens_file": str(tmp_path / "tokens.safetensors")}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(inputs), str(tmp_path / "run")],
        cwd=PROJECT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = needs(quick_check(tmp_path / "m"), samples=4, **native(METHOD="GPTQ"))[0]
    assert told.low <= int(done.stdout) <= told.high


def test_depth_costs_nothing_and_width_does():
    deep = needs(llama({**WIDE, "num_hidden_layers": 32}))[0]
    assert deep == needs(llama(WIDE))[0]
    assert deep.low > 3 * needs(llama(MEDIUM))[0].low


def test_what_is_added_up_is_told_with_what_would_need_less(monkeypatch):
    monkeypatch.setattr(memory_estimate, "has_bfloat16", lambda: True)
    wide = llama(WIDE)
    both = needs(wide, **native(METHOD="AWQ+GPTQ"))[0]
    assert "one decoder layer at a time: its weights in 32 bits (872 MB)" in both.basis
    assert "CORRECT: false" in both.advice[0]
    plain = needs(wide, **native(METHOD="AWQ+GPTQ", CORRECT=False))[0]
    assert plain.high < 0.75 * both.high
    assert "1.05 GB, while they are read and stored" in needs(wide)[0].basis
    many = needs(llama(MEDIUM), samples=512, length=2048)[0]
    assert "activations of 1,048,576 tokens (2.15 GB)" in many.basis and "fewer SAMPLES" in many.advice[-1]
    assert needs(llama(MEDIUM), samples=1024, length=2048)[0].high < many.high  # then they live on disk


def test_packages_hold_the_whole_model():
    wide = llama({**WIDE, "num_hidden_layers": 32})
    weights = 2 * 8.03 * GB
    for changes in (
        {"ALGORITHM": "LLMCompressor", "llm": {"LLMCompressor": {"ENGINE": "llmcompressor", "RECIPE": "GPTQ"}}},
        {"ALGORITHM": "TensorRTLLM", "llm": {"TensorRTLLM": {"quant_method": "fp8"}}},
        {"llm": {"AutoAWQ": {"ENGINE": "autoawq"}}},
    ):
        told = needs(wide, **changes)[0]
        assert told.low > weights and "the whole model in 16 bits (16.1 GB)" in told.basis
    measuring = needs(wide)[1]
    assert measuring.what == "measure" and weights < measuring.low < measuring.high
    assert len(needs(wide, EVALUATION={"ENABLED": False}, BENCHMARK={"ENABLED": False})) == 1


@pytest.mark.parametrize(("package", "algorithm"), [("llm-compressor", "LLMCompressor"), ("autoawq", "AutoAWQ")])
def test_packages_lie_in_their_wide_range(package, algorithm):
    """Of the table of quantizers side by side, in RESULTS.md, on the model of 102.6 million parameters."""
    rows = re.findall(rf"\| {package} \| (AWQ|GPTQ) \| (\d+) \|[^|]*\|[^|]*\|[^|]*\|[^|]*\| (\d+) \|", RESULTS)
    assert rows
    for method, tokens, peak in rows:
        section = {"ENGINE": package.replace("-", "")} | ({"RECIPE": method} if algorithm == "LLMCompressor" else {})
        told = needs(llama(MEDIUM), samples=int(tokens) // 512, ALGORITHM=algorithm, llm={algorithm: section})[0]
        assert told.low <= int(peak) * 10**6 <= told.high


def test_too_little_memory_is_told_with_what_to_do(home, monkeypatch):
    config = parse_yaml(demo_text(**native(METHOD="AWQ+GPTQ"))).config
    facts = llama({**WIDE, "num_hidden_layers": 32})
    found = memory_needs(facts, config, configurations(config), "cpu")
    assert memory_warnings(found, 400 * GB, 400 * GB) == ()
    busy = memory_warnings(found, 12 * GB, 64 * GB)
    assert len(busy) == 1 and "may wait for" not in busy[0] and "12 GB are free now" in busy[0]
    first, second = memory_warnings(found, 4 * GB, 6 * GB)
    assert "Quantizing needs about" in first and "this machine has 6 GB" in first and "Try CORRECT: false" in first
    assert "Measuring needs" in second and "EVALUATION.ENABLED" in second
    monkeypatch.setattr("backend.jobs.preflight.free_memory", lambda device: (100_000_000, 200_000_000))
    checked = check_job(parse_yaml(demo_text()).config, home)
    assert any("Quantizing needs" in warning for warning in checked.warnings)
    assert checked.memory[0].basis


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    free, total = machine_memory.free_memory("cpu")
    assert 0 < free <= total
    for name, text in (("max", "2000000000"), ("current", "1500000000"), ("stat", "anon 5\ninactive_file 400000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(machine_memory, "CGROUPS", ((tmp_path / "memory.max", tmp_path / "memory.current"),))
    assert machine_memory.free_memory("cpu") == (900_000_000, 2_000_000_000)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory.free_memory("cpu")[1] == total
    assert machine_memory.has_bfloat16() == bool(
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def test_the_demo_needs_little():
    (making, _) = needs(quick_check(MODEL_DIR))
    assert making.high < 1.2 * GB and Path(MODEL_DIR).is_dir()
