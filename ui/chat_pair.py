"""The two models of the chat page: one baseline and one quantized process, shared by every open tab.

A dashboard holds at most one pair, since two pairs would compete for the same memory. It is freed on unload,
after some time without use, when another job's pair is loaded, and when the dashboard ends (the processes end
with their parent).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from backend.chat.client import ModelProcess
from backend.chat.side_by_side import side_by_side
from backend.errors import JobError, QuantdeckError
from backend.jobs.devices import torch_device
from backend.jobs.results import result_named, results_of
from backend.jobs.store import Job, JobStore
from backend.jobs.trust import code_modules
from backend.paths import Home

IDLE_S = 900.0
SIDES = ("baseline", "quantized")

Messages = Sequence[Mapping[str, str]]


class ChatPair:
    """Loads, uses and frees the two processes. All methods may be called from any thread.

    Args:
        home: Where the jobs are.
        idle_s: Seconds without use after which both models are freed.
    """

    def __init__(self, home: Home, idle_s: float = IDLE_S) -> None:
        self.home = home
        self.idle_s = idle_s
        self._models: dict[str, ModelProcess] = {}
        self._key = ""
        self._in_use = threading.Lock()  # held while loading and while answering
        self._timer: threading.Timer | None = None

    @property
    def key(self) -> str:
        """Job and configuration whose models are loaded (see `pair_key`); empty if there is none."""
        models = list(self._models.values())
        return self._key if len(models) == len(SIDES) and all(m.alive for m in models) else ""

    def info(self, side: str) -> dict[str, Any]:
        """What the process of a side said when it was ready; empty if it is not loaded."""
        model = self._models.get(side)
        return dict(model.info) if model else {}

    def memory(self, side: str) -> int | None:
        """Peak bytes of a side's process above its idle state; None if it cannot tell now."""
        model = self._models.get(side)
        if model is None or not model.alive:
            return None
        try:
            peaks = model.memory()
        except QuantdeckError:  # it is answering, or gone
            return None
        return max((int(value) for value in peaks.values() if value is not None), default=None)

    def load(self, key: str) -> Iterator[str]:
        """Load the baseline and one quantized model of a job, one after the other; yields what it is doing.

        Args:
            key: Job and configuration, see `pair_key`.

        Raises:
            JobError: If there is no such job or configuration, it has no artefact, or the models are in use.
            ConfigError: If the models run code of their own, and the operator no longer allows it.
            EngineError: If a model cannot be loaded.
        """
        uid, _, name = key.partition("/")
        job = JobStore(self.home).get(uid)
        folders = dict(zip(SIDES, (baseline_dir(job), quantized_dir(job, name)), strict=True))
        modules = code_modules(self.home, job)
        with self._use():
            if self.key != key:
                self._close()
                self._key = key
                try:
                    for side, folder in folders.items():
                        yield f"Loading the {side} model"
                        model = ModelProcess(folder, torch_device(job.device), code_modules=modules)
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
                raise JobError("the models of this job are not loaded any more; load them again")
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
