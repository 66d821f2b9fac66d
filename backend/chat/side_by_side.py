"""Two answers at once, as one stream.

A page can follow one generator only (two would be served one after the other), so both models are read by
threads of their own and their newest states are handed out together.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

from backend.chat.answering import ChatModel, Messages, State
from backend.errors import QuantdeckError

INTERVAL_S = 0.05
"""At most 20 states per second: a browser cannot use more."""


def side_by_side(
    a: ChatModel,
    b: ChatModel,
    messages_a: Messages,
    messages_b: Messages,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[tuple[State, State]]:
    """Answer two conversations with two models at the same time, with the same sampling settings and seed.

    Yields:
        (state of a, state of b) as in `ModelProcess.generate`, at most 20 times a second; both are `done` in
        the last pair. A model that fails gets `{"error": message, "done": True}`, the other one goes on.
        Leaving the iterator early ends both answers.
    """
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    waiting: State = {"text": "", "tokens": 0, "tokens_per_s": None, "prefill_s": None, "done": False}
    states = [dict(waiting), dict(waiting)]
    changed = threading.Event()
    leaving = threading.Event()

    def follow(side: int, model: ChatModel, messages: Messages) -> None:
        try:
            answer = model.generate(messages, **sampling)  # type: ignore[arg-type]  # keys are its parameters
            for state in answer:
                states[side] = state
                changed.set()
                if leaving.is_set():
                    answer.close()  # type: ignore[attr-defined]  # generate is a generator
                    return
        except QuantdeckError as error:
            states[side] = {**states[side], "error": error.message, "kind": type(error).__name__, "done": True}
        changed.set()

    threads = [
        threading.Thread(target=follow, args=(0, a, messages_a), daemon=True),
        threading.Thread(target=follow, args=(1, b, messages_b), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        while True:
            changed.wait()
            changed.clear()
            pair = (states[0], states[1])
            yield pair
            if pair[0]["done"] and pair[1]["done"]:
                return
            time.sleep(INTERVAL_S)
    finally:
        leaving.set()
        for model, thread in zip((a, b), threads, strict=True):
            if thread.is_alive():
                model.stop()
        for thread in threads:
            thread.join(timeout=5)
