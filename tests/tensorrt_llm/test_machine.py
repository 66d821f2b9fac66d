"""What keeps a plan from running: each obstacle with what was found and what to do, on machines made here."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from backend.jobs import devices
from backend.settings import TensorRTLLMRunSettings
from backend.tensorrt_llm import machine
from backend.tensorrt_llm.machine import obstacles
from backend.tensorrt_llm.methods import IMAGE
from backend.tensorrt_llm.plan import RunPlan

DOCKER = """#!{python}
import json, pathlib, sys
about = json.loads((pathlib.Path(__file__).parent / "docker.json").read_text())
with open(pathlib.Path(__file__).parent / "calls.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if about.get("down"):
    sys.exit("Cannot connect to the Docker daemon at unix:///var/run/docker.sock.")
if sys.argv[1] == "info":
    print(json.dumps({{name: {{}} for name in about["runtimes"]}}))
elif sys.argv[1:3] == ["image", "inspect"]:
    if sys.argv[-1] not in about["images"]:
        sys.exit("Error response from daemon: No such image: " + sys.argv[-1])
    print("sha256:c0ffee")
else:
    sys.exit("unexpected " + sys.argv[1])
"""
READY = {"runtimes": ["runc", "nvidia"], "images": [IMAGE]}


class Machine:
    """A machine with a docker of its own; `gpus` and `docker` say what is there."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        docker = self.bin / "docker"
        docker.write_text(DOCKER.format(python=sys.executable))
        docker.chmod(0o755)
        monkeypatch.setenv("PATH", str(self.bin))
        monkeypatch.setenv(devices.FAKE_GPUS, str(folder / "gpus.json"))
        self.gpus({"capability": [8, 9]})
        self.docker()

    def gpus(self, *rows: dict) -> None:
        (self.folder / "gpus.json").write_text(json.dumps([{"driver": "580.95.05", **row} for row in rows]))

    def docker(self, **about: object) -> None:
        (self.bin / "docker.json").write_text(json.dumps({**READY, **about}))

    def plan(self, **changes: object) -> RunPlan:
        folders = {}
        for name in ("model", "checkpoint", "trt_checkpoint", "work", "engine"):
            folders[name] = self.folder / name
            folders[name].mkdir(exist_ok=True)
        (folders["checkpoint"] / "model.safetensors").write_bytes(b"x" * 1000)
        (folders["model"] / "model.safetensors").write_bytes(b"x" * 4000)
        values = {
            "method": "fp8", "mode": "pytorch", "dtype": "float16", "tp_size": 1, "max_batch_size": 1,
            "max_input_len": 1024, "max_output_len": 1024, "max_beam_width": 1, "max_num_tokens": None,
            "max_prompt_embedding_table_size": 0, "kv_cache_fraction": 0.2, "prompt_tokens": 512, "new_tokens": 128,
            "requests": 64, "concurrency": 16,
        }  # fmt: skip
        return RunPlan(**{**values, **folders, **changes})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


def only(found: list[machine.Obstacle]) -> machine.Obstacle:
    assert len(found) == 1, [one.message for one in found]
    return found[0]


def test_nothing_is_in_the_way_of_a_machine_that_has_it_all(here):
    assert obstacles(here.plan(), TensorRTLLMRunSettings()) == []
    assert obstacles(here.plan(mode="tensorrt", method="smoothquant"), TensorRTLLMRunSettings()) == []
    calls = (here.bin / "calls.jsonl").read_text()
    assert "pull" not in calls
    assert "run" not in [json.loads(line)[0] for line in calls.splitlines()]


def test_no_gpu_is_one_obstacle_beside_what_holds_of_docker(here):
    here.gpus()
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings()))
    assert "no NVIDIA GPU" in one.found
    here.docker(images=[])
    found = obstacles(here.plan(), TensorRTLLMRunSettings())
    assert [("GPU" in one.found, "image" in one.found) for one in found] == [(True, False), (False, True)]


def test_an_absent_image_comes_with_the_command_that_fetches_it(here):
    here.docker(images=["nvcr.io/nvidia/tensorrt-llm/release:0.9"])
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings()))
    assert one.action.endswith(f"docker pull {IMAGE}")
    other = "registry.example/trt:1.2.1"
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings(image=other)))
    assert one.action.endswith(f"docker pull {other}")


def test_a_docker_that_is_absent_down_or_without_gpus(here):
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings(docker="podlet")))
    assert ("podlet" in one.found, "[tensorrt_llm] environment" in one.action) == (True, True)
    here.docker(down=True)
    assert "Cannot connect to the Docker daemon" in only(obstacles(here.plan(), TensorRTLLMRunSettings())).found
    here.docker(runtimes=["runc"])
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings()))
    assert "NVIDIA Container Toolkit" in one.action


@pytest.mark.parametrize(
    ("method", "capability", "fits"),
    [
        ("int4_awq", [7, 5], False), ("int4_awq", [8, 0], True), ("fp8", [8, 6], False), ("fp8", [8, 9], True),
        ("w4a8_awq", [8, 0], False), ("w4a8_awq", [9, 0], True), ("nvfp4", [9, 0], False), ("nvfp4", [10, 0], True),
        ("nvfp4", [12, 0], True), (None, [7, 5], False), (None, [8, 0], True),
    ],
)  # fmt: skip
def test_each_method_needs_its_generation_of_gpus(here, method, capability, fits):
    here.gpus({"capability": capability, "name": "Some GPU"})
    found = obstacles(here.plan(method=method), TensorRTLLMRunSettings())
    assert (found == []) == fits
    if not fits:
        one = only(found)
        assert f"{capability[0]}.{capability[1]}" in one.found
        assert "Some GPU" in one.found


def test_weights_must_fit_into_what_is_free_of_each_gpu(here):
    gpu = {"capability": [9, 0], "total_bytes": 24 << 30, "used_bytes": 10 << 30}
    here.gpus(gpu)
    assert obstacles(here.plan(), TensorRTLLMRunSettings(), weight_bytes=11 << 30) == []
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings(), weight_bytes=13 << 30))
    assert "15 GB free of 25.8 GB on GPU 0" in one.found
    here.gpus(gpu, gpu)
    assert obstacles(here.plan(tp_size=2), TensorRTLLMRunSettings(), numbers=(0, 1), weight_bytes=13 << 30) == []


def test_as_many_gpus_as_share_a_layer_must_be_there(here):
    one = only(obstacles(here.plan(tp_size=2), TensorRTLLMRunSettings(), numbers=(0, 1)))
    assert ("2 GPUs" in one.needed, "CUDA_ID" in one.action) == (True, True)


@pytest.mark.parametrize(
    ("driver", "name", "fits"),
    [
        ("580.95.05", "NVIDIA GeForce RTX 4090", True), ("550.54", "NVIDIA GeForce RTX 4090", False),
        ("550.54", "NVIDIA H100", True), ("525.60", "NVIDIA H100", False),
    ],
)  # fmt: skip
def test_the_driver_must_know_the_image_s_cuda(here, driver, name, fits):
    here.gpus({"capability": [9, 0], "driver": driver, "name": name})
    found = obstacles(here.plan(), TensorRTLLMRunSettings())
    assert (found == []) == fits
    assert fits or f"driver {driver}" in only(found).found


def test_an_engine_needs_room_on_the_disk(here, monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda path: 10**9)
    plan = here.plan(mode="tensorrt", method="int8")
    one = only(obstacles(plan, TensorRTLLMRunSettings(), weight_bytes=2 * 10**9))
    assert one.found == f"1 GB free on the disk of {plan.engine}"
    assert obstacles(plan, TensorRTLLMRunSettings(), weight_bytes=10**8) == []


def environment(folder: Path, version: str, programs: tuple[str, ...]) -> TensorRTLLMRunSettings:
    (folder / "bin").mkdir(parents=True)
    (folder / f"lib/python3.12/site-packages/tensorrt_llm-{version}.dist-info").mkdir(parents=True)
    for name in programs:
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        os.chmod(folder / "bin" / name, 0o755)
    return TensorRTLLMRunSettings(environment=str(folder))


def test_an_environment_is_preferred_and_must_have_the_programs_of_a_known_version(here, tmp_path):
    here.docker(down=True)
    programs = ("trtllm-bench", "trtllm-build", "python3")
    ready = environment(tmp_path / "ready", "1.2.1", programs)
    assert obstacles(here.plan(), ready) == []
    assert "daemon" in only(obstacles(here.plan(), ready, executor="docker")).needed
    without_build = environment(tmp_path / "partly", "1.2.1", ("trtllm-bench", "python3"))
    assert obstacles(here.plan(), without_build) == []
    one = only(obstacles(here.plan(mode="tensorrt", method="int8"), without_build))
    assert "bin/trtllm-build" in one.found
    newer = environment(tmp_path / "newer", "1.4.0", programs)
    assert "TensorRT-LLM 1.4.0" in only(obstacles(here.plan(), newer)).found
    assert "no environment" in only(obstacles(here.plan(), TensorRTLLMRunSettings(), executor="environment")).found


def test_a_job_that_runs_nothing_asks_nothing(here):
    one = only(obstacles(here.plan(), TensorRTLLMRunSettings(), executor="none"))
    assert "EXECUTOR" in one.message
    assert not (here.bin / "calls.jsonl").exists()
