"""Practice in using what was just read: lists to repeat and little tables to look things up in.

Small models come to copy from their context late and suddenly; text that cannot be predicted in any other way
makes them learn it in a few hundred steps. Reading, sums and stories about a given hero all rest on it.
"""

from __future__ import annotations

import random

from backend.demo.dialogues import render
from backend.demo.grammar import listed, words
from backend.demo.stories import ANIMALS, BOYS, FOODS, GIRLS, PLACES, THINGS

_LISTS = "women,men,towns,creatures,colours,person.job,person.pet,girls,boys,animals,goods,clothes,nouns,adjectives"
_WORDS = [word for name in _LISTS.split(",") for word in words(name)]
_CUES = ["Once more:", "Again:", "And again:", "The same once more:", "Repeat:"]
_HAS = ["{n}: {v}", "{n} = {v}", "{n} has {v}.", "{n} got {v}.", "{n} chose {v}.", "{n} and {v}"]


def repetition(rng: random.Random) -> str:
    """Words in random order, then the same words again, one to three times."""
    row = " ".join(_row(rng))
    return "\n".join([row, *(f"{rng.choice(_CUES)} {row}" for _ in range(rng.randint(1, 3)))])


def table(rng: random.Random) -> str:
    """Pairs of a name and a value, then the same pairs in other orders."""
    names = rng.sample(GIRLS + BOYS + words("towns"), rng.randint(2, 7))
    numbers = [str(number) for number in range(2, 99)]
    values = rng.sample(rng.choice([numbers, THINGS, FOODS, PLACES, ANIMALS, words("colours")]), len(names))
    form = rng.choice(_HAS)
    lines = [form.format(n=n, v=v) for n, v in zip(names, values, strict=True)]
    joint = rng.choice(["\n", " "])
    return "\n\n".join(joint.join(rng.sample(lines, len(lines))) for _ in range(rng.randint(2, 4)))


def request(rng: random.Random) -> str:
    """A dialogue in which the user asks to have a few words repeated."""
    row = _row(rng)[: rng.randint(2, 8)]
    text = listed(row) if rng.random() < 0.5 else " ".join(row)
    cue = rng.choice(["Repeat:", "Say this:", "Repeat after me:", "Please repeat:"])
    return render([("user", f"{cue} {text}"), ("assistant", text)])


def document(rng: random.Random) -> str:
    """A few tables or repetitions."""
    makers = [repetition, repetition, table, table, table, request]
    return "\n\n".join(rng.choice(makers)(rng) for _ in range(rng.randint(1, 3)))


def _row(rng: random.Random) -> list[str]:
    return [str(rng.randint(1, 99)) if rng.random() < 0.15 else rng.choice(_WORDS) for _ in range(rng.randint(6, 30))]
