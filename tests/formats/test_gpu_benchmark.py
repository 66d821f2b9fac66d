"""The script for CUDA machines must not rot on machines without one: its checks also run on CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from backend.paths import PROJECT
from benchmarks.gpu import SMALL, Results, check_kernels, make_model, time_aqlm
from benchmarks.gpu_modelopt import check_modelopt


def test_checks_pass_on_cpu() -> None:
    results = Results()
    check_kernels(results, "cpu")
    assert results.failures == []
    assert len(results.rows) > 10


def test_one_layer_tells_of_the_whole_model() -> None:
    results = Results()
    time_aqlm(results, "cpu", SMALL | {"hidden_size": 128, "intermediate_size": 256}, "tiny")
    told = dict(results.rows)
    assert "not measured" in told["tiny: AQLM aqlm-1x16-g8"]
    assert "4 layers (extrapolated)" in told["tiny: AQLM aqlm-2x8-g8"]
    assert results.failures == []


def test_modelopt_is_checked_where_it_is(tmp_path) -> None:
    results = Results()
    shape = SMALL | {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 4}
    check_modelopt(results, make_model(tmp_path, shape, "cpu"), tmp_path, "cpu", ["int8", "nvfp4"])
    told = dict(results.rows)
    assert "differs" in told["modelopt int8"] and "FAILED" in told["modelopt nvfp4"]  # a CPU cannot make it
    assert results.failures == ["modelopt nvfp4"]


def test_a_value_beyond_its_limit_is_a_failure() -> None:
    results = Results()
    results.check("good", 1.0, 1.0)
    results.check("bad", 1.1, 1.0)
    results.check("nonsense", float("nan"), 1.0)
    assert results.failures == ["bad", "nonsense"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_says_that_there_is_no_device() -> None:
    script = PROJECT / "benchmarks" / "gpu.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(["sh", str(script)], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 3
    assert "No CUDA device" in done.stderr
