"""The pair of chat models, with real processes of the built-in demo model on both sides."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from backend.demo import MODEL_DIR
from backend.errors import JobError
from backend.jobs.store import JobStore
from backend.paths import Home
from backend.schema import parse_yaml
from tests.jobs.stored import start
from ui.chat_pair import SIDES, ChatPair, pair_key, quantized_dir
from ui.draft import TEMPLATE

ASK = [{"role": "user", "content": "Hello!"}]
SAMPLING = {"max_new_tokens": 4, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def finished_job(home: Home, model_dir: Path = MODEL_DIR, *, several: bool = False) -> str:
    """A succeeded job whose artefact is the demo model itself; a loader does not care how a folder came to be."""
    store = JobStore(home)
    job = store.create(TEMPLATE, parse_yaml(TEMPLATE).config, device="cpu")
    assert start(store, job)
    result: dict[str, Any] = {"model_dir": str(model_dir), "artefact": str(MODEL_DIR)}
    if several:
        folders = {"w4": str(MODEL_DIR), "w3": str(home.root / "gone")}
        result["results"] = [{"name": n, "label": n, "artefact": f, "rows": []} for n, f in folders.items()]
    assert store.update(job.uid, 1, artefact=str(MODEL_DIR), result=result)
    assert store.move(job.uid, "succeeded", actor="runner", attempt=1)
    return job.uid


def children() -> set[int]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # a process that has just ended
            if "model_process" in " ".join(process.cmdline()):
                found.add(process.pid)
    return found


def until(condition, seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def test_load_answer_busy_unload(tmp_path):
    home = Home.at(tmp_path)
    uid, pair = finished_job(home), ChatPair(home)
    before = children()
    try:
        assert list(pair.load(uid)) == ["Loading the baseline model", "Loading the quantized model"]
        assert pair.key == uid and len(children() - before) == 2
        assert list(pair.load(uid)) == []  # already there
        answer = pair.answer(uid, ASK, ASK, **SAMPLING)
        next(answer)
        with pytest.raises(JobError, match="loading or answering"):
            next(pair.answer(uid, ASK, ASK, **SAMPLING))
        *_, (a, b) = answer
        assert a["done"] and b["done"] and a["text"] == b["text"] != ""
        assert all(pair.memory(side) > 0 for side in SIDES)
    finally:
        pair.unload()
    assert pair.key == "" and until(lambda: children() <= before)
    with pytest.raises(JobError, match="not loaded"):
        next(pair.answer(uid, ASK, ASK, **SAMPLING))


def test_an_answer_that_is_left_early_frees_the_pair_and_an_idle_pair_is_closed(tmp_path):
    home = Home.at(tmp_path)
    uid, pair = finished_job(home), ChatPair(home, idle_s=1.0)
    before = children()
    try:
        list(pair.load(uid))
        answer = pair.answer(uid, ASK, ASK, **{**SAMPLING, "max_new_tokens": 500})
        next(answer)
        answer.close()  # what happens when the tab is closed
        assert until(lambda: children() <= before)
        assert pair.key == ""
    finally:
        pair.unload()


def test_a_configuration_is_chosen_by_its_name(tmp_path):
    home = Home.at(tmp_path)
    job = JobStore(home).get(finished_job(home, several=True))
    assert pair_key(job, "w4") == f"{job.uid}/w4"
    assert quantized_dir(job, "w4") == quantized_dir(job) == MODEL_DIR
    with pytest.raises(JobError, match="no quantized model on disk"):
        quantized_dir(job, "w3")
    with pytest.raises(JobError, match="no configuration 'w2' on disk; it has w4, w3"):
        list(ChatPair(home).load(f"{job.uid}/w2"))


def test_what_is_missing_is_named(tmp_path):
    home = Home.at(tmp_path)
    uid = finished_job(home, tmp_path / "gone")
    with pytest.raises(JobError, match="no job"):
        list(ChatPair(home).load("nothing"))
    with pytest.raises(JobError, match="baseline model quantdeck/demo"):
        list(ChatPair(home).load(uid))
