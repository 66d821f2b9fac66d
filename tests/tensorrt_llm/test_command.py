"""Command lines: what the tables allow is written as it stands, everything else is refused with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest

from backend.errors import ConfigError
from backend.tensorrt_llm.command import build_command
from backend.tensorrt_llm.flags import BUILD, LATENCY, SERVE, TABLES, THROUGHPUT, TOOLS

BENCH = {"--model": "local", "--model_path": "/m", "--dataset": Path("/d.jsonl")}
FOLDERS = {"--checkpoint_dir": Path("/c"), "--output_dir": Path("/e")}


def refusal(tool, values, **options):
    with pytest.raises(ConfigError) as caught:
        build_command(tool, values, **options)
    return caught.value


def test_options_of_the_group_stand_before_the_subcommand():
    argv = build_command(THROUGHPUT, {"--concurrency": 1, **BENCH, "--streaming": True, "--workspace": Path("/w")})
    assert argv == [
        "trtllm-bench", "--model", "local", "--model_path", "/m", "--workspace", "/w", "throughput", "--concurrency",
        "1", "--dataset", "/d.jsonl", "--streaming",
    ]  # fmt: skip


def test_a_switch_that_is_off_and_a_value_that_is_none_are_left_out():
    argv = build_command(BUILD, {**FOLDERS, "--gather_context_logits": False, "--gemm_plugin": None})
    assert argv == ["trtllm-build", "--checkpoint_dir", "/c", "--output_dir", "/e"]


def test_the_server_gets_its_model_first():
    argv = build_command(SERVE, {"--port": 8000, "MODEL": Path("/m"), "--kv_cache_free_gpu_memory_fraction": 0.25})
    assert argv == ["trtllm-serve", "/m", "--port", "8000", "--kv_cache_free_gpu_memory_fraction", "0.25"]


@pytest.mark.parametrize(
    ("tool", "gone"),
    [
        (BUILD, "--max_output_len"), (BUILD, "--tp_size"), (BUILD, "--gpus_per_node"), (BUILD, "--use_fused_mlp"),
        (THROUGHPUT, "--kv_cache_free_gpu_memory_fraction"), (SERVE, "--kv_cache_free_gpu_mem_fraction"),
        (LATENCY, "--output_json"), (SERVE, "--trust_remote_code"),
    ],
)  # fmt: skip
def test_what_a_program_does_not_have_is_refused_with_what_it_has(tool, gone):
    error = refusal(tool, {gone: 1})
    assert error.key == gone
    assert all(name in error.message for name in TABLES["1.2.1"][tool].flags)


def test_a_near_miss_is_named():
    assert "did you mean --max_batch_size?" in refusal(BUILD, {"--max_batchsize": 1}).message


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("--backend", "trt", "pytorch, _autodeploy, tensorrt"),
        ("--concurrency", 0, "at least 1"),
        ("--concurrency", True, "whole number"),
        ("--concurrency", 1.0, "whole number"),
        ("--concurrency", "1", "whole number"),
        ("--kv_cache_free_gpu_mem_fraction", 1.5, "at most 1"),
        ("--kv_cache_free_gpu_mem_fraction", float("nan"), "finite"),
        ("--streaming", "yes", "true or false"),
        ("--report_json", "report.json", "absolute path"),
        ("--report_json", "/a/../../etc/passwd", "without '..'"),
        ("--model", "--help", "does not begin with '-'"),
        ("--model", "a\nb", "printable"),
        ("--model", "", "printable"),
        ("--model", 7, "must be text"),
    ],
)
def test_a_value_of_another_kind_is_refused(name, value, allowed):
    error = refusal(THROUGHPUT, {**BENCH, name: value})
    assert (error.key, allowed in error.message) == (name, True), error.message


@pytest.mark.parametrize("name", ["--model", "--model_path", "--dataset"])
def test_what_a_program_needs_must_be_given(name):
    assert refusal(THROUGHPUT, {k: v for k, v in BENCH.items() if k != name}).key == name


def test_unknown_programs_and_versions_are_refused_with_those_that_there_are():
    assert all(tool in refusal("trtllm-prune", {}).message for tool in TOOLS)
    assert "1.2.1" in refusal(BUILD, FOLDERS, version="1.3.0").message


@pytest.mark.parametrize("version", list(TABLES))
def test_the_tables_are_sound(version):
    """No option twice, choices only where there are any, every required name an option."""
    assert set(TABLES[version]) == set(TOOLS)
    for tool in TABLES[version].values():
        assert not tool.common.keys() & tool.flags.keys()
        assert set(tool.required) <= tool.common.keys() | tool.flags.keys()
        for flag in (*tool.common.values(), *tool.flags.values()):
            assert flag.name.startswith("--")
            assert bool(flag.choices) == (flag.kind == "choice")
            assert (flag.least is not None) == (flag.kind in ("int", "float"))
