"""A question with one right and three wrong answers, before its choices are put in order."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        kind: ``"world"``, ``"reading"``, ``"arithmetic"`` or ``"language"``.
        key: What makes two questions the same question; decides whether it is reserved for the test.
        prompt: Everything before the line ``Answer:``.
        answer: The right answer.
        wrong: Three different wrong answers.
    """

    kind: str
    key: str
    prompt: str
    answer: str
    wrong: tuple[str, ...]

    @property
    def text(self) -> str:
        """The question with its right answer, as it stands in training text."""
        return f"{self.prompt}\nAnswer: {self.answer}"


def wrong_answers(rng: random.Random, answer: str, pool: Iterable[str]) -> tuple[str, ...]:
    """Three different values of `pool` other than `answer`."""
    return tuple(rng.sample(sorted(set(pool) - {answer}), 3))


def draw(make: Callable[[random.Random], Item], rng: random.Random, accept: Callable[[Item], bool]) -> Item:
    """The first item of `make` that is accepted (the test takes reserved ones, training text the others)."""
    while True:
        item = make(rng)
        if accept(item):
            return item
