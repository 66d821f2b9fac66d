"""The pool of processes: results do not depend on it, errors name the layer, nothing outlives the parent."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor

from backend.errors import EngineError, ModelError
from backend.paths import PROJECT
from backend.quantize.aqlm.presets import PRESETS, SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import Fitted
from backend.quantize.aqlm.shared import receive, send, share
from backend.quantize.aqlm.workers import FitPool
from tests.quantize.aqlm import slow

SCHEME = AdditiveScheme(2, 6, 8)
SETTINGS = SearchSettings(max_epochs=1, candidates=4, warm_ups=1)
WAIT_S = 30.0


def items() -> dict[str, tuple[Tensor, Tensor, int]]:
    """Five layers of two inputs."""
    grams = [slow.gram(96, seed=0).float(), slow.gram(64, seed=1).float()]
    shapes = {"q": (96, 0), "k": (32, 0), "v": (32, 0), "o": (64, 1), "down": (160, 1)}
    return {
        name: (slow.weight(out, len(grams[site]), seed=n), grams[site], n)
        for n, (name, (out, site)) in enumerate(shapes.items())
    }


def same(a: Fitted, b: Fitted) -> bool:
    return (a.relative_error, a.notes) == (b.relative_error, b.notes) and all(
        torch.equal(getattr(a.weight, part), getattr(b.weight, part)) for part in ("codes", "codebooks", "scales")
    )


@pytest.fixture(scope="module")
def pool() -> Iterator[FitPool]:
    with FitPool(2) as started:
        yield started


def processes() -> list[psutil.Process]:
    """Workers of this process."""
    return [p for p in psutil.Process().children() if "backend.quantize.aqlm.worker" in p.cmdline()]


def test_the_result_does_not_depend_on_the_number_of_workers(pool: FitPool) -> None:
    done: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with FitPool(1) as alone:
            expected = alone.fit_all(items(), SCHEME, SETTINGS, lambda name, fitted: done.append(name))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert done == list(items())
    found = pool.fit_all(items(), SCHEME, SETTINGS, lambda name, fitted: done.append(name))
    assert sorted(done[5:]) == sorted(done[:5])
    assert list(found) == list(expected) == list(items())
    assert all(same(found[name], expected[name]) for name in found)
    for name, (W, H, _) in items().items():  # noqa: N806
        weight = found[name].weight.dequantize()
        assert found[name].relative_error == pytest.approx(
            float(slow.loss(weight - W, H).sum() / slow.loss(W, H).sum()), rel=1e-2
        )


def test_processes_are_started_once(pool: FitPool) -> None:
    pool.fit_all(items(), SCHEME, SETTINGS)
    before = {p.pid for p in processes()}
    pool.fit_all(items(), SCHEME, SETTINGS)
    assert {p.pid for p in processes()} == before
    assert len(before) == 2
    assert all(p.num_threads() < 4 + (os.cpu_count() or 1) for p in processes())


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_names_the_layer_and_the_pool_goes_on(workers: int) -> None:
    broken = items()
    broken["v"][0][3, 4] = float("nan")
    with FitPool(workers) as pool:
        with pytest.raises(ModelError, match="^v: The weight holds values that are not finite"):
            pool.fit_all(broken, SCHEME, SETTINGS)
        assert len(pool.fit_all(items(), SCHEME, SETTINGS)) == 5


def test_an_error_of_the_caller_comes_through(pool: FitPool) -> None:
    def fail(name: str, fitted: Fitted) -> None:
        raise RuntimeError(f"disk full at {name}")

    with pytest.raises(RuntimeError, match="disk full"):
        pool.fit_all(items(), SCHEME, SETTINGS, fail)


def test_a_worker_that_dies_is_an_error() -> None:
    def kill(name: str, fitted: Fitted) -> None:
        for process in processes():
            process.kill()

    with (
        FitPool(2) as own,
        pytest.raises(EngineError, match=r"ended early \(signal 9; it may have run out of memory\)"),
    ):
        own.fit_all(items(), SCHEME, SETTINGS, kill)
        own.fit_all(items(), SCHEME, SETTINGS)


def test_nothing_is_left_at_the_end() -> None:
    before = {p.pid for p in processes()}
    with FitPool(2) as own:
        own.fit_all(items(), SCHEME, SETTINGS)
        assert len({p.pid for p in processes()} - before) == 2
    assert {p.pid for p in processes()} == before


def test_workers_die_with_a_parent_that_is_killed() -> None:
    """In the middle of a fit that would take hours."""
    program = (
        "import torch\n"
        "from backend.quantize.aqlm.presets import PRESETS\n"
        "from backend.quantize.aqlm.scheme import AdditiveScheme\n"
        "from backend.quantize.aqlm.workers import FitPool\n"
        "from dataclasses import replace\n"
        "W, H = torch.randn(512, 512), torch.eye(512)\n"
        "settings = replace(PRESETS['thorough'], max_epochs=10**6)\n"
        "print('ready', flush=True)\n"
        "FitPool(2).fit_all({'a': (W, H, 0), 'b': (W, H, 1)}, AdditiveScheme(), settings)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=PROJECT, stdout=subprocess.PIPE)
    try:
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 2 * WAIT_S
        busy: list[psutil.Process] = []
        while len(busy) < 2 and time.monotonic() < deadline:
            busy = [p for p in psutil.Process(parent.pid).children() if p.cpu_times().user > 4]
            time.sleep(0.2)
        assert len(busy) == 2, "no two workers became busy"
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    _, alive = psutil.wait_procs(busy, timeout=WAIT_S)
    assert not alive


def test_tensors_travel_whole() -> None:
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tensors = {
        "W": torch.randn(3, 5),
        "codes": torch.arange(6, dtype=torch.int32).view(1, 2, 3),
    }
    shared = {name: (tensor, share(tensor)) for name, tensor in tensors.items()}
    with here, there:
        send(here, {"seed": 3}, shared)
        for _, descriptor in shared.values():
            os.close(descriptor)
        received = receive(there)
        assert received is not None
        message, found = received
        assert message == {"seed": 3}
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        here.close()
        assert receive(there) is None


def test_the_default_preset_is_what_workers_get(pool: FitPool) -> None:
    """All settings pass the message, not only those that differ from the defaults."""
    odd = SearchSettings(**{**PRESETS["thorough"].to_dict(), "max_epochs": 1, "damp": 0.5})
    one = {"q": items()["q"]}
    with FitPool(1) as alone:
        expected = alone.fit_all(one, SCHEME, odd)["q"]
    assert same(pool.fit_all(one, SCHEME, odd)["q"], expected)
