"""Fits many layers at once: on CPU in worker processes of one thread each, on a GPU one after the other.

Threads inside one fit do not pay, its operations are too small. Processes do, and the result of a layer is the same in
each of them.
"""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from types import TracebackType

import torch
from torch import Tensor

from backend.errors import EngineError, ModelError
from backend.formats.additive_weight import AdditiveWeight
from backend.paths import PROJECT
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import Fitted, fit
from backend.quantize.aqlm.shared import receive, send, share

Item = tuple[Tensor, Tensor, int]
"""W (out, in), H (in, in), seed."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class FitPool:
    """Worker processes that are started once and reused. A context manager; at its end they are gone.

    They end with this process, too, however it ends.

    Args:
        workers: How many; 1 computes in this process.
    """

    def __init__(self, workers: int) -> None:
        self._count = max(1, workers)
        self._workers: list[_Worker] = []

    def __enter__(self) -> FitPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the processes, whatever they do."""
        for worker in self._workers:
            worker.stop()
        self._workers.clear()

    def fit_all(
        self,
        items: Mapping[str, Item],
        scheme: AdditiveScheme,
        settings: SearchSettings,
        on_done: Callable[[str, Fitted], None] | None = None,
    ) -> dict[str, Fitted]:
        """Fit layers. The result does not depend on the number of workers.

        Args:
            items: By name; layers that share an input should share the tensor H.
            scheme: Of all of them.
            settings: Likewise.
            on_done: Called in this process as each layer is done, in any order.

        Returns:
            By name, in the order of `items`; on the device of each W.

        Raises:
            ModelError: As `fit` does; names the layer.
            EngineError: If a worker process died.
        """
        tell = on_done or (lambda name, fitted: None)
        found: dict[str, Fitted] = {}
        on_cpu = all(W.device.type == "cpu" for W, _, _ in items.values())
        run = self._in_workers if on_cpu and self._count > 1 else _in_process
        try:
            for name, fitted in run(items, scheme, settings):
                found[name] = fitted
                tell(name, fitted)
        except BaseException:
            self.close()  # what the others still compute is not wanted any more
            raise
        return {name: found[name] for name in items}

    def _in_workers(
        self, items: Mapping[str, Item], scheme: AdditiveScheme, settings: SearchSettings
    ) -> Iterator[tuple[str, Fitted]]:
        while len(self._workers) < self._count:
            self._workers.append(_Worker())
        waiting = sorted(items, key=lambda name: -items[name][0].numel())  # the largest first, so that all end together
        about = {"scheme": asdict(scheme), "settings": settings.to_dict()}
        busy: dict[_Worker, str] = {}
        with selectors.DefaultSelector() as selector, _SharedInputs(items) as inputs:
            for worker in self._workers:
                selector.register(worker.end, selectors.EVENT_READ, worker)
            while waiting or busy:
                for worker in self._workers:
                    if worker not in busy and waiting:
                        busy[worker] = waiting.pop(0)
                        inputs.send(worker, busy[worker], about)
                for key, _ in selector.select():
                    name = busy.pop(key.data, "")
                    yield name, key.data.result(name)


class _Worker:
    """One process and this side's end of its socket."""

    def __init__(self) -> None:
        self.end, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "backend.quick_start", "backend.quantize.aqlm.worker", str(there.fileno())],
                pass_fds=[there.fileno()],
                cwd=PROJECT,
                env={**os.environ, **dict.fromkeys(THREAD_VARIABLES, "1")},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def result(self, name: str) -> Fitted:
        answer = receive(self.end)
        if answer is None:
            code = self._process.wait()
            why = f"signal {-code}; it may have run out of memory" if code < 0 else f"exit code {code}, see the log"
            raise EngineError(f"A process that fitted {name or 'layers'} ended early ({why}).")
        message, tensors = answer
        if "error" in message:
            raise ModelError(f"{name}: {message['error']}")
        weight = AdditiveWeight(**{key: tensor.clone() for key, tensor in tensors.items()})
        return Fitted(weight, message["relative_error"], tuple(message["notes"]))

    def stop(self) -> None:
        self.end.close()
        self._process.kill()
        self._process.wait()


@dataclass
class _SharedInputs:
    """Gram matrices in shared memory for as long as a layer that needs them waits."""

    items: Mapping[str, Item]

    def __enter__(self) -> _SharedInputs:
        self._grams: dict[int, int] = {}
        self._users: dict[int, int] = {}
        for _, H, _ in self.items.values():  # noqa: N806
            self._users[id(H)] = self._users.get(id(H), 0) + 1
        return self

    def __exit__(self, *about: object) -> None:
        for descriptor in self._grams.values():
            os.close(descriptor)

    def send(self, worker: _Worker, name: str, about: Mapping[str, object]) -> None:
        W, H, seed = self.items[name]  # noqa: N806
        W, key = W.float(), id(H)  # noqa: N806
        H = H.float()  # noqa: N806
        if key not in self._grams:
            self._grams[key] = share(H)
        descriptor = share(W)
        try:
            send(worker.end, {**about, "seed": seed}, {"W": (W, descriptor), "H": (H, self._grams[key])})
        except BrokenPipeError:
            worker.result(name)  # says why
        finally:
            os.close(descriptor)
        self._users[key] -= 1
        if not self._users[key]:
            os.close(self._grams.pop(key))


def _in_process(
    items: Mapping[str, Item], scheme: AdditiveScheme, settings: SearchSettings
) -> Iterator[tuple[str, Fitted]]:
    with _one_thread():
        for name, (W, H, seed) in items.items():  # noqa: N806
            try:
                yield name, fit(W.float(), H.float(), scheme, settings, seed=seed)
            except ModelError as error:
                raise ModelError(f"{name}: {error.message}") from None


@contextmanager
def _one_thread() -> Iterator[None]:
    """As in a worker: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
