"""A real child process: answers, limits, stop, crash, and that it never outlives its parent."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from backend.chat.client import ModelProcess
from backend.chat.side_by_side import side_by_side
from backend.errors import EngineError
from backend.formats.loader import load_model
from backend.paths import PROJECT
from backend.quantize.aqlm.scheme import AdditiveScheme
from tests.evaluate.tiny import make_model
from tests.formats.additive import write_additive

HELLO = [{"role": "user", "content": "the old river"}]


def gone(pid: int, seconds: float = 20) -> bool:
    """Whether a process ends within some seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.05)
                continue
        return True
    return False


def child_pid(model: ModelProcess) -> int:
    assert model._child is not None
    return model._child.pid


def test_ready_says_what_the_page_needs(shared: ModelProcess, shared_plain: ModelProcess) -> None:
    assert shared.info["context"] == 256
    assert shared.info["chat_template"] is True and shared_plain.info["chat_template"] is False
    assert shared.info["dtype"] == "bfloat16" and shared.info["threads"] == 1
    assert shared.info["decode_path"] == "bfloat16 weights"


def test_an_aqlm_model_answers_from_its_codes(chat_folder: Path, tmp_path: Path) -> None:
    folder = write_additive(chat_folder, tmp_path / "aqlm", AdditiveScheme(2, 4, 4))
    ours = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    prompt = tokenizer("<s>[user] the old river\n[assistant] ", add_special_tokens=False, return_tensors="pt").input_ids
    output = ours.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    with ModelProcess(folder, threads=1) as model:
        assert model.info["decode_path"] == "AQLM 2x4 g4: look-up tables over packed codes (numba)"
        *_, last = model.generate(HELLO, max_new_tokens=8)
    assert last["text"] == tokenizer.decode(output[: last["tokens"]], skip_special_tokens=True)


def test_child_survives_the_thread_that_started_it(shared: ModelProcess) -> None:
    time.sleep(0.3)  # its thread has ended (see the fixture); a signal would have arrived by now
    assert shared.alive


def test_streamed_answer_equals_transformers(shared: ModelProcess, chat_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    model = AutoModelForCausalLM.from_pretrained(chat_folder, dtype=torch.bfloat16)
    prompt = tokenizer("<s>[user] the old river\n[assistant] ", add_special_tokens=False, return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1] :]
    states = list(shared.generate(HELLO, max_new_tokens=24))
    assert states[-1]["text"] == tokenizer.decode(output, skip_special_tokens=True).rstrip("\ufffd")
    assert states[-1]["prompt_tokens"] == prompt.shape[1]
    assert states[-1]["done"] and not any(state["done"] for state in states[:-1])
    assert states[-1]["finish"] in ("length", "stop")
    assert all(b["text"].startswith(a["text"]) for a, b in zip(states, states[1:], strict=False))
    assert states[-1]["tokens_per_s"] > 0 and states[0]["prefill_s"] > 0


def test_seed_fixes_a_sampled_answer(shared: ModelProcess) -> None:
    def answer(seed: int) -> str:
        return list(shared.generate(HELLO, max_new_tokens=16, temperature=1.0, top_p=0.95, seed=seed))[-1]["text"]

    assert answer(1) == answer(1)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_too_long_a_prompt_is_an_error_and_the_process_stays(shared: ModelProcess) -> None:
    (state,) = shared.generate([{"role": "user", "content": "river " * 400}], max_new_tokens=16)
    assert state["done"] and "context is 256 tokens" in state["error"]
    (state,) = shared.generate(HELLO, max_new_tokens=250)
    assert "250 more were asked for" in state["error"]
    assert list(shared.generate(HELLO, max_new_tokens=2))[-1]["tokens"] == 2


def test_template_refusal_and_bad_messages_are_errors(shared: ModelProcess) -> None:
    (state,) = shared.generate([{"role": "system", "content": "x"}], max_new_tokens=4)
    assert "no system turns" in state["error"]
    (state,) = shared.generate([{"role": "robot", "content": "x"}], max_new_tokens=4)
    assert "role among" in state["error"]
    (state,) = shared.generate([], max_new_tokens=4)
    assert "empty" in state["error"]
    assert shared.alive


def test_stop_ends_the_answer_early(shared: ModelProcess) -> None:
    states = []
    for state in shared.generate(HELLO, max_new_tokens=200, temperature=1.5):
        states.append(state)
        if state["tokens"] == 3:
            shared.stop()
    assert states[-1]["done"] and states[-1]["finish"] == "cancelled"
    assert states[-1]["tokens"] < 200


def test_leaving_an_answer_does_not_spoil_the_next(shared: ModelProcess) -> None:
    expected = list(shared.generate(HELLO, max_new_tokens=8))[-1]["text"]
    answer = shared.generate([{"role": "user", "content": "boat"}], max_new_tokens=200, temperature=1.5)
    next(answer)
    answer.close()  # type: ignore[attr-defined]
    assert list(shared.generate(HELLO, max_new_tokens=8))[-1]["text"] == expected


def test_only_one_answer_at_a_time(shared: ModelProcess) -> None:
    answer = shared.generate(HELLO, max_new_tokens=200, temperature=1.5)
    next(answer)
    with pytest.raises(EngineError, match="still answering"):
        next(shared.generate(HELLO))
    answer.close()  # type: ignore[attr-defined]


def test_benchmark_and_memory(shared: ModelProcess) -> None:
    timing = shared.benchmark(32, 8)
    assert timing["prefill_s"] > 0 and timing["decode_s"] > 0
    memory = shared.memory()
    assert memory["load_peak_bytes"] > 0 and memory["run_peak_bytes"] > 0
    with pytest.raises(EngineError, match="context is 256 tokens"):
        shared.benchmark(250, 8)


def test_two_models_stream_together(shared: ModelProcess, shared_plain: ModelProcess) -> None:
    started = time.monotonic()
    pairs = list(side_by_side(shared, shared_plain, HELLO, HELLO, max_new_tokens=30, temperature=1.0, seed=4))
    assert pairs[-1][0]["done"] and pairs[-1][1]["done"]
    assert len(pairs) <= 20 * (time.monotonic() - started) + 2
    for side, model in enumerate((shared, shared_plain)):
        alone = list(model.generate(HELLO, max_new_tokens=30, temperature=1.0, seed=4))[-1]
        assert pairs[-1][side]["text"] == alone["text"]


def test_side_by_side_goes_on_when_one_model_refuses(shared: ModelProcess, shared_plain: ModelProcess) -> None:
    too_long = [{"role": "user", "content": "river " * 400}]
    a, b = list(side_by_side(shared, shared_plain, too_long, HELLO, max_new_tokens=5))[-1]
    assert "context" in a["error"] and "error" not in b and b["tokens"] >= 1


def test_leaving_side_by_side_stops_both(shared: ModelProcess, shared_plain: ModelProcess) -> None:
    stream = side_by_side(shared, shared_plain, HELLO, HELLO, max_new_tokens=200, temperature=1.5)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert list(shared.generate(HELLO, max_new_tokens=2))[-1]["done"]
    assert list(shared_plain.generate(HELLO, max_new_tokens=2))[-1]["done"]


def test_killed_child_is_reported_can_be_started_again_and_unloaded(chat_folder: Path) -> None:
    model = ModelProcess(chat_folder, threads=1)
    model.start()
    answer = model.generate(HELLO, max_new_tokens=200, temperature=1.5)
    next(answer)
    os.kill(child_pid(model), signal.SIGKILL)
    with pytest.raises(EngineError, match="killed by signal 9"):
        list(answer)
    with pytest.raises(EngineError, match="killed by signal 9"):
        next(model.generate(HELLO))
    model.start()
    assert list(model.generate(HELLO, max_new_tokens=3))[-1]["done"]
    pid = child_pid(model)
    answer = model.generate(HELLO, max_new_tokens=200, temperature=1.5)
    next(answer)
    threading.Timer(0.02, model.close).start()
    with pytest.raises(EngineError, match="was unloaded while it was answering"):
        while True:
            next(answer)
    assert not model.alive and gone(pid)
    with pytest.raises(EngineError, match="not started"):
        next(model.generate(HELLO))


def test_child_ends_with_its_parent(chat_folder: Path) -> None:
    code = (
        "import sys; from backend.chat.client import ModelProcess; "
        "m = ModelProcess(sys.argv[1]); m.start(); print(m._child.pid, flush=True); sys.stdin.read()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(chat_folder)],
        cwd=PROJECT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None and parent.stdin is not None
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    assert gone(pid)
    parent.stdin.close()
    parent.stdout.close()


@pytest.mark.parametrize("broken", ["missing", "weights"])
def test_a_model_that_cannot_be_loaded_says_why(tmp_path: Path, broken: str) -> None:
    folder = tmp_path / "model"
    if broken == "weights":
        make_model().save_pretrained(folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    model = ModelProcess(folder)
    with pytest.raises(EngineError, match="could not be loaded"):
        model.start()
    assert not model.alive
