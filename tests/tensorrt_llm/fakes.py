"""Stand-ins for docker and TensorRT-LLM's programs: real executables that record what they were given, and misbehave.

`behaviour.json` in their folder says how, by program: `{"trtllm-bench": "hang"}`. What a container would do is done by
running the command after the image, with the container's paths turned back into those of this machine.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from backend.tensorrt_llm.plan import RunPlan

COMMON = """#!{python}
import json, os, signal, subprocess, sys, time
from pathlib import Path
HERE = Path({folder!r})

def record(name, argv):
    with open(HERE / "calls.jsonl", "a") as file:
        file.write(json.dumps([name, *argv]) + "\\n")

def option(argv, name):
    return argv[argv.index(name) + 1]

def behaviour(name):
    return json.loads((HERE / "behaviour.json").read_text()).get(name, "")

def misbehave(name):
    how = behaviour(name)
    if how == "fail":
        print("loading", flush=True)
        print("[TensorRT-LLM] CUDA out of memory on this card", file=sys.stderr, flush=True)
        sys.exit(3)
    if how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hang":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (HERE / "hanging.tmp").write_text(json.dumps([os.getpid(), child.pid]))
        os.replace(HERE / "hanging.tmp", HERE / "hanging.json")
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        while True:
            time.sleep(0.1)
    if how == "garbage":
        sys.stdout.buffer.write(bytes(range(256)) * 400 + b"\\rno line break")
        sys.stdout.flush()
    return how

def memory(used):
    path = os.environ.get("QUANTDECK_FAKE_GPUS")
    if path:
        rows = json.loads(Path(path).read_text())
        rows[0]["used_bytes"] = used
        Path(path + ".tmp").write_text(json.dumps(rows))
        os.replace(path + ".tmp", path)
"""

BENCH = """
argv = sys.argv[1:]
record("trtllm-bench", argv)
how = misbehave("trtllm-bench")
rows = [json.loads(line) for line in open(option(argv, "--dataset"))]
assert Path(option(argv, "--extra_llm_api_options")).is_file()
requests, concurrent = int(option(argv, "--num_requests")), int(option(argv, "--concurrency"))
memory(7_000_000_000)
time.sleep(1.5 if how == "slow" else 0)  # long enough to be seen
memory(2_000_000_000)
report = {
    "engine": {"model": "local", "version": "1.2.1", "backend": "Pytorch", "quantization": "W4A16_AWQ"},
    "request_info": {"num_requests": requests, "avg_num_concurrent_requests": concurrent,
                     "avg_input_length": len(rows[0]["input_ids"]), "avg_output_length": rows[0]["output_tokens"]},
    "performance": {"system_output_throughput_tok_s": 100.0 * concurrent, "system_total_throughput_tok_s": 500.0,
                    "request_throughput_req_s": 2.5, "avg_request_latency_ms": 400.0},
    "streaming_metrics": {"token_output_speed_tok_s": 120.0, "avg_ttft_ms": 9.0, "avg_tpot_ms": 8.3},
}
if "/model" in option(argv, "--model_path") or how == "sixteen bit":
    report["engine"]["quantization"] = None
if how == "not finite":
    report["performance"]["system_output_throughput_tok_s"] = float("nan")
text = json.dumps(report)
if how != "no report":
    Path(option(argv, "--report_json")).write_text(text[: len(text) // 2] if how == "truncated" else text)
"""

BUILD = """
argv = sys.argv[1:]
record("trtllm-build", argv)
how = misbehave("trtllm-build")
if how != "nothing":
    folder = Path(option(argv, "--output_dir"))
    (folder / "config.json").write_text('{"pretrained_config": {"vocab_size": 8}}')
    (folder / "rank0.engine").write_bytes(b"e" * 1234)
"""

PYTHON = """
argv = sys.argv[1:]
record("python3", argv)
misbehave("python3")
windows = json.loads(Path(argv[1]).read_text())["windows"]
rows = [{"nll": 2.0 * len(w["counted"]), "count": len(w["counted"])} for w in windows]
Path(argv[2]).write_text(json.dumps({"windows": rows, "version": "1.2.1"}))
"""

DOCKER = """
argv = sys.argv[1:]
record("docker", argv)
if argv[0] in ("kill", "rm"):
    marker = HERE / f"container-{argv[-1]}"
    if not marker.exists():
        sys.exit(1)
    try:
        os.killpg(int(marker.read_text()), signal.SIGKILL)
    except ProcessLookupError:
        pass
    marker.unlink(missing_ok=True)
elif argv[0] == "info":
    print(behaviour("info") or '{"nvidia": {}, "runc": {}}')
elif argv[:2] == ["image", "inspect"]:
    if behaviour("image") == "absent":
        sys.exit("Error: No such image")
    print("sha256:0123")
elif argv[0] == "run":
    if behaviour("docker") == "no runtime":
        print("docker: could not select device driver with capabilities: [[gpu]]", file=sys.stderr)
        sys.exit(125)
    volumes = [argv[i + 1].removesuffix(":ro").rsplit(":", 1) for i, word in enumerate(argv) if word == "-v"]
    command = argv[argv.index({image!r}) + 1 :]
    for host, inside in volumes:
        command = [host + word[len(inside):] if word == inside or word.startswith(inside + "/") else word
                   for word in command]
    # as the real one: what runs is no child of the client, and lives on when the client is killed
    child = subprocess.Popen([str(HERE / "inside" / command[0]), *command[1:]], start_new_session=True)
    marker = HERE / f"container-{option(argv, '--name') if '--name' in argv else os.getpid()}"
    marker.write_text(str(child.pid))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    code = child.wait()
    marker.unlink(missing_ok=True)
    sys.exit(code if code >= 0 else 128 - code)
"""

IMAGE = "example.org/tensorrt-llm:1.2.1"


class Fakes:
    """The stand-ins in a folder of their own, `bin`.

    Args:
        folder: Where to make them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "fakes"
        self.environment = self.folder / "inside"
        for where in (self.folder / "bin", self.environment / "bin"):
            where.mkdir(parents=True)
        self.behave()
        for name, text in (("trtllm-bench", BENCH), ("trtllm-build", BUILD), ("python3", PYTHON)):
            self._make(self.environment / "bin" / name, text)
            (self.environment / name).symlink_to(self.environment / "bin" / name)
        self._make(self.folder / "bin" / "docker", DOCKER.replace("{image!r}", repr(IMAGE)))

    def behave(self, **how: str) -> None:
        """Say how the programs behave; `-` is written `_`."""
        (self.folder / "behaviour.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in how.items()}))

    def calls(self, program: str = "") -> list[list[str]]:
        """The calls so far: program and arguments."""
        path = self.folder / "calls.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [row for row in rows if not program or row[0] == program]

    @property
    def docker(self) -> str:
        """Path of the docker client."""
        return str(self.folder / "bin" / "docker")

    def _make(self, path: Path, text: str) -> None:
        head = COMMON.replace("{python}", sys.executable).replace("{folder!r}", repr(str(self.folder)))
        path.write_text(head + text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)


def plan_in(folder: Path, **changes: Any) -> RunPlan:
    """A small plan whose folders are there, with weights in them."""
    places = {name: folder / name for name in ("model", "checkpoint", "work", "engine")}
    places["trt_checkpoint"] = places["checkpoint"] / "tensorrt_llm_checkpoint"
    for name in ("model", "trt_checkpoint"):
        places[name].mkdir(parents=True, exist_ok=True)
    (places["model"] / "model.safetensors").write_bytes(b"m" * 4000)
    (places["checkpoint"] / "model.safetensors").write_bytes(b"q" * 1000)
    values: dict[str, Any] = {
        "method": "int4_awq", "mode": "pytorch", "dtype": "float16", "tp_size": 1, "max_batch_size": 1,
        "max_input_len": 64, "max_output_len": 64, "max_beam_width": 1, "max_num_tokens": None,
        "max_prompt_embedding_table_size": 0, "kv_cache_fraction": 0.2, "prompt_tokens": 8, "new_tokens": 4,
        "requests": 5, "concurrency": 3, "perplexity": True, **places,
    }  # fmt: skip
    values |= changes
    if values["mode"] == "pytorch":
        values["trt_checkpoint"] = None
    return RunPlan(**values)


def gpus_file(folder: Path, count: int = 1) -> Path:
    """A driver's answer with some GPUs, for `QUANTDECK_FAKE_GPUS`."""
    path = folder / "gpus.json"
    row = {"name": "Fake A100", "total_bytes": 40 << 30, "used_bytes": 2_000_000_000, "capability": [8, 0]}
    path.write_text(json.dumps([{**row, "driver": "580.95.05"}] * count))
    return path


def alive(pid: int) -> bool:
    """Whether a process lives and is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def plain_environment() -> dict[str, str]:
    """Environment variables for a program under test."""
    return {**os.environ, "PYTHONUNBUFFERED": "1"}
