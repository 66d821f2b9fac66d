"""The two models of the chat page: a baseline and a quantized one, shared by every open tab.

Each is a process of ours, or a model behind a server that the operator allows. A dashboard holds at most one pair,
since two pairs would compete for the same memory. It is freed on unload, after some time without use, when another
pair is loaded, and when the dashboard ends (the processes end with their parent).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.chat.answering import ChatModel, Messages
from backend.chat.client import ModelProcess
from backend.chat.side_by_side import side_by_side
from backend.errors import JobError, QuantdeckError
from backend.jobs.devices import torch_device
from backend.jobs.results import result_named, results_of
from backend.jobs.store import Job, JobStore
from backend.jobs.trust import code_modules
from backend.paths import Home
from backend.served.address import allowed_url
from backend.served.client import ServedModel
from backend.settings import Settings

IDLE_S = 900.0
SIDES = ("baseline", "quantized")
SERVED = "served:"


class ChatPair:
    """Loads, uses and frees the two models. All methods may be called from any thread.

    Args:
        home: Where the jobs are.
        idle_s: Seconds without use after which both models are freed.
    """

    def __init__(self, home: Home, idle_s: float = IDLE_S) -> None:
        self.home = home
        self.idle_s = idle_s
        self._models: dict[str, ChatModel] = {}
        self._key = ""
        self._in_use = threading.Lock()  # held while loading and while answering
        self._timer: threading.Timer | None = None

    @property
    def key(self) -> str:
        """Which models are loaded (see `chat_key`); empty if there are none."""
        models = list(self._models.values())
        return self._key if len(models) == len(SIDES) and all(model.alive for model in models) else ""

    def info(self, side: str) -> dict[str, Any]:
        """What the model of a side said when it was ready; empty if it is not loaded."""
        model = self._models.get(side)
        return dict(model.info) if model else {}

    def memory(self, side: str) -> int | None:
        """Peak bytes of a side's process above its idle state; None if it cannot tell now, or is on a server."""
        model = self._models.get(side)
        if model is None or not model.alive:
            return None
        try:
            peaks = model.memory()
        except QuantdeckError:  # it is answering, or gone
            return None
        return max((int(value) for value in peaks.values() if value is not None), default=None)

    def load(self, key: str) -> Iterator[str]:
        """Make both models ready, one after the other; yields what it is doing.

        Args:
            key: Which ones, see `chat_key`.

        Raises:
            JobError: If there is no such job or configuration, it has no artefact, or the models are in use.
            ConfigError: If a model runs code of its own, or is on a server, and the operator does not allow that.
            EngineError: If a model cannot be loaded, or its server does not answer.
        """
        models = dict(zip(SIDES, self._both(key), strict=True))
        with self._use():
            if self.key != key:
                self._close()
                self._key = key
                try:
                    # servers first: one that is not there is told before a large model is loaded in vain
                    for side, model in sorted(models.items(), key=lambda item: not isinstance(item[1], ServedModel)):
                        yield f"Loading the {side} model"
                        self._models[side] = model
                        model.start()
                except BaseException:
                    self._close()
                    raise

    def answer(self, key: str, baseline: Messages, quantized: Messages, **sampling: Any) -> Iterator[tuple[Any, Any]]:
        """Answer with both models at once; see `backend.chat.side_by_side`.

        Raises:
            JobError: If other models are loaded by now, or they are in use.
        """
        with self._use():
            if self.key != key:
                raise JobError("these models are not loaded any more; load them again")
            yield from side_by_side(
                self._models["baseline"], self._models["quantized"], baseline, quantized, **sampling
            )

    def stop(self) -> None:
        """End the answers that are being made; both models stay loaded."""
        for model in list(self._models.values()):
            model.stop()

    def unload(self) -> None:
        """Free both models; answers that are being made end with an error."""
        if self._timer is not None:
            self._timer.cancel()
        self._close()

    def _both(self, key: str) -> tuple[ChatModel, ChatModel]:
        """The models that a key names, neither started yet."""
        quantized, _, baseline = key.partition("\n")
        if not baseline and quantized.startswith(SERVED):
            raise QuantdeckError("A served model comes without its baseline; choose one for the other side, too.")
        return self._model("baseline", baseline or quantized), self._model("quantized", quantized)

    def _model(self, side: str, key: str) -> ChatModel:
        if key.startswith(SERVED):
            url, _, model = key.removeprefix(SERVED).partition(" ")
            return ServedModel(allowed_url(url, Settings.load(self.home).served.urls), model)
        uid, _, name = key.partition("/")
        job = JobStore(self.home).get(uid)
        folder = baseline_dir(job) if side == "baseline" else quantized_dir(job, name)
        return ModelProcess(folder, torch_device(job.device), code_modules=code_modules(self.home, job))

    def _close(self) -> None:
        models, self._models, self._key = self._models, {}, ""
        for model in models.values():
            model.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        """Holds the pair; however its use ends, the time without use starts to count."""
        if not self._in_use.acquire(blocking=False):
            raise JobError("the models are loading or answering, in this tab or another one; stop that or wait")
        try:
            if self._timer is not None:
                self._timer.cancel()
            yield
        finally:
            self._timer = threading.Timer(self.idle_s, self._close_if_idle)
            self._timer.daemon = True
            self._timer.start()
            self._in_use.release()

    def _close_if_idle(self) -> None:
        if self._in_use.acquire(blocking=False):
            try:
                self._close()
            finally:
                self._in_use.release()


def chat_key(quantized: str, baseline: str = "") -> str:
    """What names the two models of a chat.

    Args:
        quantized: A `pair_key` or a `served_key`.
        baseline: A job's uid or a `served_key`; empty for the baseline of the quantized model's own job.
    """
    return f"{quantized}\n{baseline}" if baseline else quantized


def served_key(url: str, model: str) -> str:
    """What names a model of a server; without a model, the only one that the server has."""
    return f"{SERVED}{url} {model}"


def pair_key(job: Job, name: str = "") -> str:
    """What names a pair of models: the job's uid, with the configuration's name where the job has several."""
    return f"{job.uid}/{name}" if name and len(results_of(job.result)) > 1 else job.uid


def quantized_dir(job: Job, name: str = "") -> Path:
    """Folder of one of a job's quantized models, by the configuration's name; the first one's if it is empty.

    Raises:
        JobError: If there is none.
    """
    saved = result_named(job, name)["artefact"] if results_of(job.result) else job.artefact
    folder = Path(saved) if saved else None
    if folder is None or not folder.is_dir():
        raise JobError(f"job {job.job_id} has no quantized model on disk; choose another job, or run it again")
    return folder


def baseline_dir(job: Job) -> Path:
    """Folder of the model that a job quantized, as its first stage found it.

    Raises:
        JobError: If it is not there any more.
    """
    folder = Path(job.result["model_dir"]) if job.result and "model_dir" in job.result else None
    if folder is None or not folder.is_dir():
        raise JobError(f"the baseline model {job.model} of job {job.job_id} is not on this disk any more")
    return folder
