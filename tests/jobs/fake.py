"""Stage programs that stand in for the real ones in tests of the runner: small, quick, and failing on demand.

One module plays every part; the keys of a request tell which. An engine's configuration may carry `settings`.

Trouble after so many layers, in the first attempt only unless `every_attempt` is true:
`die_at` (with `die_by`: the name of a signal, an exit code, or `error: <message>`; SIGKILL by default),
`full_at` (meet a full disk), `fill_at` (fill the disk, really), `sleep_at` (hang), `allocate_at` (take memory without
end, under a limit of `limit_bytes` of address space).

In every attempt: `sleep_s` (per layer), `ignore_signals` (SIGINT and SIGTERM), `leak` (start a daemon in a session of
its own that ignores them too; `bare`: with no environment), `say` (write this to the log at every layer, `times`
times), `keeps_layers: false` (an engine without checkpoints).

HOME/fake.json may say `spill`: the program that may see the token for the Hub then prints it in many ways, and ends
`well` or `badly`.
"""

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

from backend.child import run_child
from backend.demo import MODEL_DIR

LAYERS = 4


def program(request, events):
    if "configurations" in request:
        return quantize(request, events)
    if "config" in request:
        return prepare(request)
    if request["stage"] == "evaluate_fidelity":
        return compare_outputs(request)
    if "baseline_dir" in request:
        return {"baseline": {"metrics": [speed(10.0)]}, "quantized": {"metrics": [speed(20.0)]}}
    return evaluate(request, events)


def prepare(request):
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokens.safetensors").write_bytes(b"tokens")
    (out / "text.jsonl").write_text('{"text": "x"}\n')
    told = json.loads((Path(request["home"]) / "fake.json").read_text())
    model_dir = told.get("model_dir", str(MODEL_DIR))
    if "spill" in told:
        spill(os.environ["HF_TOKEN"], told["spill"])
    return {
        "model_dir": model_dir, "model_commit": None, "tokens_file": str(out / "tokens.safetensors"), "samples": 8,
        "samples_wanted": 8, "text_file": str(out / "text.jsonl"), "text_name": "fake:test",
    }  # fmt: skip


def spill(token, end):
    os.write(2, f"spilt {token}\nGET https://user:{token}@example.org/?token={token}\n{dict(os.environ)}\n".encode())
    for cut in range(1, len(token), 5):
        os.write(2, f"in pieces {token[:cut]}".encode())
        time.sleep(0.01)
        os.write(2, f"{token[cut:]}\n".encode())
    if end == "badly":
        raise PermissionError(f"401 for {token}")


def quantize(request, events):
    """Layer by layer: each adds bytes to every configuration's file, then the state is kept."""
    out, kept = Path(request["out_dir"]), Path(request["checkpoint_dir"]) / "state.json"
    run_dir, settings = out.parent, request["configurations"][0].get("settings", {})
    calls = run_dir / "calls.json"
    state = json.loads(kept.read_text()) if kept.exists() else {"layers": 0}
    calls.write_text(json.dumps([*(json.loads(calls.read_text()) if calls.exists() else []), state["layers"]]))
    names = [c["name"] for c in request["configurations"]]
    misbehave(run_dir, settings)
    reports = {name: [] for name in names}
    for layer in range(LAYERS):
        for name in names:
            report = {"layer": f"model.layers.{layer}", "error": 0.01, "rtn_error": 0.02, "notes": []}
            if layer == 1:
                report["notes"] = ["self_attn.q_proj: H was singular, damp raised to 0.1"]
            reports[name].append(report)
            if layer < state["layers"]:
                continue
            (out / name).mkdir(parents=True, exist_ok=True)
            with open(out / name / "model.safetensors", "rb+" if layer else "wb") as file:
                file.seek(32 * layer)
                file.write(hashlib.sha256(f"{name} {layer} {request['seed']}".encode()).digest())
                file.truncate()
            events.note(stage="quantize", step=layer + 1, total=LAYERS, configuration=name, **report)
        if layer >= state["layers"] and settings.get("keeps_layers", True):
            kept.write_text(json.dumps({"layers": layer + 1}))
        for _ in range(settings.get("times", 1) if "say" in settings else 0):
            print(settings["say"])
        time.sleep(settings.get("sleep_s", 0))
        trouble(run_dir, settings, layer + 1, out / names[0])
    for name in names:
        (out / name / "config.json").write_text("{}")
    cost = {"wall_s": 1.0, "cpu_s": 1.0}
    return {
        "timings": {"calibrate": cost, "quantize": cost, "save": cost}, "tokens": 64,
        "results": [
            {"name": n, "layers": reports[n], "skipped": {"lm_head": "is to be kept"}, "notes": [f"note of {n}"]}
            for n in names
        ],
    }  # fmt: skip


DAEMON = """
import os, signal, sys, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if os.fork():
    os._exit(0)
os.setsid()
with open(sys.argv[1], "w") as file:
    file.write(str(os.getpid()))
time.sleep(600)
"""


def misbehave(run_dir, settings):
    if settings.get("ignore_signals"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if settings.get("leak"):
        note = run_dir / "leaked"
        bare = {"env": {}} if settings["leak"] == "bare" else {}
        subprocess.run([sys.executable, "-c", DAEMON, str(note)], check=True, **bare)
        while not (note.exists() and note.read_text()):
            time.sleep(0.02)


def trouble(run_dir, settings, layers, out):
    kinds = ("die_at", "full_at", "fill_at", "sleep_at", "allocate_at")
    marker = run_dir / "had_trouble"
    if marker.exists() and not settings.get("every_attempt"):
        return
    found = [kind for kind in kinds if settings.get(kind) == layers]
    if not found:
        return
    marker.touch()
    {"die_at": die, "full_at": meet_full_disk, "fill_at": fill_disk, "allocate_at": take_memory}.get(
        found[0], lambda *_: time.sleep(600)
    )(settings, out)


def die(settings, out):
    how = settings.get("die_by", "SIGKILL")
    if isinstance(how, int):
        os._exit(how)
    if how.startswith("error: "):
        raise RuntimeError(how.removeprefix("error: "))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.kill(os.getpid(), signal.Signals[how])
    time.sleep(10)


def meet_full_disk(settings, out):
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")


def fill_disk(settings, out):
    with open(out / "filler", "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def take_memory(settings, out):
    limit = settings["limit_bytes"]
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    taken = []
    while True:
        taken.append(bytearray(1 << 24))


def evaluate(request, events):
    name = request.get("configuration", "")
    failing = Path(request["perplexity"]["text_file"]).parent.parent / "fail.json"
    if failing.exists() and name in json.loads(failing.read_text()):
        raise RuntimeError(f"no luck with {name}")
    events.note(stage=request["stage"], step=1, total=1, message="", **({"configuration": name} if name else {}))
    quantized = request["stage"] == "evaluate_quantized"
    return {"metrics": [perplexity(2.6 if quantized else 2.5)], "peak_rss_bytes": 1, "wall_s": 0.1}


def compare_outputs(request):
    deadly = Path(request["spool_dir"]) / "deadly.json"
    if deadly.exists() and request.get("configuration", "") in json.loads(deadly.read_text()):
        os.kill(os.getpid(), signal.SIGKILL)
    return {"baseline": {"metrics": [divergence(0.0)]}, "quantized": {"metrics": [divergence(0.00071)]}}


def perplexity(value):
    return {
        "metric": "perplexity", "name": "Perplexity (fake:test, gptq)", "value": value, "stderr": None, "unit": "",
        "higher_is_better": False, "protocol": {"summary": "fake"}, "samples": [],
    }  # fmt: skip


def divergence(value):
    return {
        "metric": "KL divergence", "name": "KL(base ‖ quantized), fake:test", "value": value, "stderr": None,
        "unit": "nats/token", "higher_is_better": False, "protocol": {"summary": "fake"}, "samples": [],
    }  # fmt: skip


def speed(value):
    return {
        "metric": "tokens/s", "name": "Decode (8 tokens)", "value": value, "stderr": None, "unit": "tokens/s",
        "higher_is_better": True, "protocol": {"summary": "fake"}, "samples": [],
    }  # fmt: skip


if __name__ == "__main__":
    run_child(program)
