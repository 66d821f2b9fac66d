"""Stage programs that stand in for the real ones in tests of the runner: small, quick, and failing on demand.

One module plays every part; the keys of a request tell which. An engine's configuration may carry `settings`:
`die_at` (kill this process after so many layers), `full_at` (meet a full disk), `cancel_at` (sleep there), each only
in the first attempt; `keeps_layers: false` for an engine without checkpoints.
"""

import hashlib
import json
import os
import signal
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
    if "baseline_dir" in request:
        return {"baseline": {"metrics": [speed(10.0)]}, "quantized": {"metrics": [speed(20.0)]}}
    return evaluate(request, events)


def prepare(request):
    out = Path(request["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokens.safetensors").write_bytes(b"tokens")
    (out / "text.jsonl").write_text('{"text": "x"}\n')
    model_dir = json.loads((Path(request["home"]) / "fake.json").read_text()).get("model_dir", str(MODEL_DIR))
    return {
        "model_dir": model_dir, "model_commit": None, "tokens_file": str(out / "tokens.safetensors"), "samples": 8,
        "samples_wanted": 8, "text_file": str(out / "text.jsonl"), "text_name": "fake:test",
    }  # fmt: skip


def quantize(request, events):
    """Layer by layer: each adds bytes to every configuration's file, then the state is kept."""
    out, kept = Path(request["out_dir"]), Path(request["checkpoint_dir"]) / "state.json"
    run_dir, settings = out.parent, request["configurations"][0].get("settings", {})
    calls = run_dir / "calls.json"
    state = json.loads(kept.read_text()) if kept.exists() else {"layers": 0}
    calls.write_text(json.dumps([*(json.loads(calls.read_text()) if calls.exists() else []), state["layers"]]))
    names = [c["name"] for c in request["configurations"]]
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


def trouble(run_dir, settings, layers, out):
    marker = run_dir / "had_trouble"
    if marker.exists() or layers not in (settings.get("die_at"), settings.get("full_at"), settings.get("sleep_at")):
        return
    marker.touch()
    if layers == settings.get("die_at"):
        os.kill(os.getpid(), signal.SIGKILL)
    if layers == settings.get("full_at"):
        with open("/dev/full", "wb", buffering=0) as full:
            full.write(b"x")
    time.sleep(600)


def evaluate(request, events):
    name = request.get("configuration", "")
    failing = Path(request["perplexity"]["text_file"]).parent.parent / "fail.json"
    if failing.exists() and name in json.loads(failing.read_text()):
        raise RuntimeError(f"no luck with {name}")
    events.note(stage=request["stage"], step=1, total=1, message="", **({"configuration": name} if name else {}))
    quantized = request["stage"] == "evaluate_quantized"
    return {"metrics": [perplexity(2.6 if quantized else 2.5)], "peak_rss_bytes": 1, "wall_s": 0.1}


def perplexity(value):
    return {
        "metric": "perplexity", "name": "Perplexity (fake:test, gptq)", "value": value, "stderr": None, "unit": "",
        "higher_is_better": False, "protocol": {"summary": "fake"}, "samples": [],
    }  # fmt: skip


def speed(value):
    return {
        "metric": "tokens/s", "name": "Decode (8 tokens)", "value": value, "stderr": None, "unit": "tokens/s",
        "higher_is_better": True, "protocol": {"summary": "fake"}, "samples": [],
    }  # fmt: skip


if __name__ == "__main__":
    run_child(program)
