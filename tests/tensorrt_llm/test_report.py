"""Reports of TensorRT-LLM's programs: read as they are written, and refused when anything of them is not there."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest

from backend.errors import EngineError
from backend.tensorrt_llm.report import read_bench_report, read_perplexity

REPORT = {
    "engine": {
        "model": "local", "model_path": "/checkpoint", "engine_dir": "None", "version": "1.2.1", "backend": "Pytorch",
        "dtype": "float16", "kv_cache_dtype": None, "quantization": "W4A16_AWQ",
    },
    "world_info": {
        "tp_size": 1, "pp_size": 1, "ep_size": None, "world_size": 1, "max_batch_size": 16, "max_num_tokens": 8192,
        "scheduling_policy": "GUARANTEED_NO_EVICT", "kv_cache_percentage": 0.2, "issue_rate": 5.5e3,
    },
    "request_info": {
        "num_requests": 16, "avg_num_concurrent_requests": 0.998, "avg_input_length": 512.0, "avg_output_length": 128.0,
    },
    "performance": {
        "total_latency_ms": 10512.5, "avg_request_latency_ms": 656.9, "request_throughput_req_s": 1.522,
        "system_output_throughput_tok_s": 194.82, "system_total_throughput_tok_s": 974.1,
        "output_throughput_per_user_tok_s": 194.9, "output_throughput_per_gpu_tok_s": 194.82,
        "request_latency_percentiles_ms": {"p50": 656.1},
    },
    "streaming_metrics": {
        "token_output_speed_tok_s": 198.3, "avg_ttft_ms": 15.25, "avg_tpot_ms": 5.05, "tpot_percentiles": {},
        "ttft_percentiles": {}, "gen_tps_percentiles": {},
    },
    "dataset": {"isl_stats": {}, "osl_stats": {}, "num_requests": 16},
}  # fmt: skip
ASKED = {"requests": 16, "prompt_tokens": 512, "new_tokens": 128}


def written(folder: Path, report: object) -> Path:
    path = folder / "quantized_single.json"
    path.write_text(json.dumps(report, indent=4))
    return path


def test_the_numbers_are_those_of_the_file(tmp_path):
    assert read_bench_report(written(tmp_path, REPORT), **ASKED) == {
        "output_tokens_per_s": 194.82, "total_tokens_per_s": 974.1, "requests_per_s": 1.522, "latency_ms": 656.9,
        "decode_tokens_per_s": 198.3, "first_token_ms": 15.25, "per_token_ms": 5.05, "requests": 16,
        "concurrent": 0.998, "version": "1.2.1", "backend": "Pytorch", "quantization": "W4A16_AWQ",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("performance", "system_output_throughput_tok_s"),
        ("streaming_metrics", "token_output_speed_tok_s"),
        ("request_info", "avg_num_concurrent_requests"),
    ],
)
@pytest.mark.parametrize("value", [None, math.nan, math.inf, "194.8", True, [1], 0.0, -3.0])
def test_a_number_that_is_none_is_an_error_that_names_it(tmp_path, section, key, value):
    report = copy.deepcopy(REPORT)
    report[section][key] = value
    with pytest.raises(EngineError, match=f"{section}.{key}"):
        read_bench_report(written(tmp_path, report), **ASKED)
    del report[section][key]
    with pytest.raises(EngineError, match=f"has no {section}.{key}"):
        read_bench_report(written(tmp_path, report), **ASKED)


@pytest.mark.parametrize("section", ["engine", "performance", "request_info", "streaming_metrics"])
def test_a_section_that_is_not_there_is_named(tmp_path, section):
    report = {name: about for name, about in REPORT.items() if name != section}
    with pytest.raises(EngineError, match=f"no section {section}"):
        read_bench_report(written(tmp_path, report), **ASKED)


@pytest.mark.parametrize(
    ("key", "value"), [("num_requests", 15), ("avg_input_length", 511.5), ("avg_output_length", 64.0)]
)
def test_a_report_of_another_run_is_refused(tmp_path, key, value):
    report = copy.deepcopy(REPORT)
    report["request_info"][key] = value
    with pytest.raises(EngineError, match=f"{key} {value:g}; .* was asked for"):
        read_bench_report(written(tmp_path, report), **ASKED)


@pytest.mark.parametrize("content", ["", json.dumps(REPORT)[:300], "OOM\n", "\x00\xff"])
def test_a_report_that_was_cut_or_is_none_is_refused(tmp_path, content):
    path = tmp_path / "quantized_load.json"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(EngineError, match=r"quantized_load.json cannot be read as JSON"):
        read_bench_report(path, **ASKED)


def test_a_report_that_is_not_there_or_no_object_is_refused(tmp_path):
    with pytest.raises(EngineError, match=r"ended without writing none.json"):
        read_bench_report(tmp_path / "none.json", **ASKED)
    with pytest.raises(EngineError, match="holds a list"):
        read_bench_report(written(tmp_path, [1]), **ASKED)


def test_perplexity_is_exp_of_the_mean_loss_per_token(tmp_path):
    path = written(tmp_path, {"windows": [{"nll": 12.5, "count": 5}, {"nll": 3.5, "count": 3}], "version": "1.2.1"})
    told = read_perplexity(path, [5, 3])
    assert told["perplexity"] == pytest.approx(math.exp(2.0), rel=1e-15)
    assert (told["nll"], told["tokens"], told["windows"]) == (2.0, 8, [12.5, 3.5])


@pytest.mark.parametrize(
    "rows",
    [
        [{"nll": 1.0, "count": 5}],
        [{"nll": 1.0, "count": 5}, {"nll": 1.0, "count": 2}],
        [{"nll": 1.0, "count": 5}, "x"],
        None,
        [{"nll": None, "count": 5}, {"nll": 1.0, "count": 3}],
        [{"nll": math.nan, "count": 5}, {"nll": 1.0, "count": 3}],
        [{"nll": -9.0, "count": 5}, {"nll": 1.0, "count": 3}],
        [{"nll": 9000.0, "count": 5}, {"nll": 1.0, "count": 3}],
    ],
)
def test_losses_of_other_windows_or_that_are_none_are_refused(tmp_path, rows):
    with pytest.raises(EngineError):
        read_perplexity(written(tmp_path, {"windows": rows, "version": "1.2.1"}), [5, 3])
