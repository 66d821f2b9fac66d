"""The script for another machine, run by the real sh after its folder was moved, with a docker that records."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from backend.tensorrt_llm.plan import TRT_CHECKPOINT, RunPlan
from backend.tensorrt_llm.script import shell_script
from tests.tensorrt_llm.fakes import plan_in

IMAGE = "nvcr.io/nvidia/tensorrt-llm/release:1.2.1"
DOCKER = """#!{python}
import json, os, sys
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1:3] == ["image", "inspect"]:
    sys.exit(0 if os.environ.get("IMAGE_IS_THERE") else 1)
if os.environ.get("FAILS") and os.environ["FAILS"] in sys.argv:
    sys.exit(4)
"""


def exported(folder: Path, **changes: object) -> RunPlan:
    """A plan whose folders lie in an export, but for the 16-bit model."""
    export = folder / "export"
    places = {
        "checkpoint": export, "work": export / "tensorrt_llm_run", "engine": export / "engine",
        "trt_checkpoint": export / TRT_CHECKPOINT,
    }  # fmt: skip
    export.mkdir()
    return plan_in(folder, **places, **changes)


def run(folder: Path, plan: RunPlan, *args: str, **variables: str) -> tuple[int, list[list[str]], Path]:
    """Move the export and run its script there; returns the exit code, docker's calls and the new place."""
    (plan.checkpoint / "run_tensorrt_llm.sh").write_text(shell_script(plan, plan.checkpoint, IMAGE))
    place = folder / "an other's machine $HOME"
    shutil.copytree(plan.checkpoint, place)
    docker = folder / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER.format(python=sys.executable))
    docker.chmod(0o755)
    environment = {"PATH": f"{docker.parent}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), **variables}
    done = subprocess.run(["sh", str(place / "run_tensorrt_llm.sh"), *args], cwd="/", env=environment)
    calls = folder / "calls"
    return done.returncode, [json.loads(line) for line in calls.read_text().splitlines()], place


def option(argv: list[str], name: str) -> str:
    return argv[argv.index(name) + 1]


def tools(calls: list[list[str]]) -> list[str]:
    return [call[call.index(IMAGE) + 1] for call in calls if call[0] == "run"]


def test_measures_what_was_copied_and_pulls_the_image_once(tmp_path):
    code, calls, place = run(tmp_path, exported(tmp_path))
    assert code == 0
    assert calls[:2] == [["image", "inspect", IMAGE], ["pull", IMAGE]]
    assert tools(calls) == ["trtllm-bench", "trtllm-bench", "python3"]
    bench = calls[2]
    volumes = [bench[i + 1] for i, word in enumerate(bench) if word == "-v"]
    assert sorted(volumes) == sorted([f"{place}/.:/checkpoint:ro", f"{place}/tensorrt_llm_run:/scratch"])
    assert option(bench, "--user") == f"{os.getuid()}:{os.getgid()}"
    assert option(bench, "--dataset").startswith("/scratch/")
    assert (place / "tensorrt_llm_run").is_dir()
    assert str(tmp_path / "export") not in json.dumps(calls)


def test_an_engine_is_built_first_and_a_failure_ends_it(tmp_path):
    plan = exported(tmp_path, mode="tensorrt", method="smoothquant")
    code, calls, place = run(tmp_path, plan, IMAGE_IS_THERE="1", FAILS="trtllm-build")
    assert code == 4
    assert tools(calls) == ["trtllm-build"]
    assert f"{place}/{TRT_CHECKPOINT}:/trt_checkpoint:ro" in calls[-1]
    assert (place / "engine").is_dir()
    assert ["pull", IMAGE] not in calls


def test_the_16_bit_model_is_measured_where_it_is_named(tmp_path):
    code, calls, _ = run(tmp_path, exported(tmp_path), IMAGE_IS_THERE="1", MODEL="/models/with space")
    assert code == 0
    assert tools(calls) == ["trtllm-bench", "trtllm-bench", "python3"] * 2
    assert len([call for call in calls if "/models/with space:/model:ro" in call]) == 3


@pytest.mark.parametrize("mode", ["pytorch", "tensorrt"])
def test_serves_on_loopback_alone(tmp_path, mode):
    code, calls, _ = run(tmp_path, exported(tmp_path, mode=mode), "serve", IMAGE_IS_THERE="1")
    assert (code, tools(calls)) == (0, ["trtllm-serve"])
    assert option(calls[-1], "-p") == "127.0.0.1:8000:8000"
    assert calls[-1][calls[-1].index("trtllm-serve") + 1] == ("/engine" if mode == "tensorrt" else "/checkpoint")
