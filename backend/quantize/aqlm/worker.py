"""A process that fits layers for `workers.FitPool`: `python -m backend.quick_start` with this module and a DESCRIPTOR.

It computes on one thread, and ends when the other end of its socket is closed, in the middle of a fit, too.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import sys
import threading
from typing import Any

import torch
from torch import Tensor

from backend.errors import QuantdeckError
from backend.formats.additive_weight import AdditiveWeight
from backend.quantize.aqlm.presets import SearchSettings
from backend.quantize.aqlm.scheme import AdditiveScheme
from backend.quantize.aqlm.search import fit
from backend.quantize.aqlm.shared import receive, send, share


def serve(end: socket.socket) -> None:
    """Fit what comes until the other end closes; then this process ends at once."""
    tasks: queue.SimpleQueue[tuple[dict[str, Any], dict[str, Tensor]]] = queue.SimpleQueue()

    def listen() -> None:
        while (task := receive(end)) is not None:
            tasks.put(task)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        message, tensors = tasks.get()
        try:
            found = fit(
                tensors["W"],
                tensors["H"],
                AdditiveScheme(**message["scheme"]),
                SearchSettings.from_dict(message["settings"]),
                seed=message["seed"],
            )
        except QuantdeckError as error:
            send(end, {"error": error.message}, {})
            continue
        weight: AdditiveWeight = found.weight
        shared = {n: (t, share(t)) for n, t in vars(weight).items()}
        send(end, {"relative_error": found.relative_error, "notes": list(found.notes)}, shared)
        for _, descriptor in shared.values():
            os.close(descriptor)


def main() -> None:
    """Serve on the socket whose descriptor is the first argument."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever interrupts the job interrupts the starter, which closes
    torch.set_num_threads(1)
    serve(socket.socket(fileno=int(sys.argv[1])))
