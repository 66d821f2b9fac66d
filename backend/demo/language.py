"""Fill the gap: agreement of verb and noun, tense, pronouns, and the right tool for a task."""

from __future__ import annotations

import random

from backend.demo.grammar import words
from backend.demo.items import Item, draw, wrong_answers
from backend.demo.splits import reserved
from backend.demo.stories import BOYS, GIRLS, PLACES, WEATHERS

RESERVED_PERCENT = 10
_NOUNS, _ADJECTIVES, _LINKS, _STATES = words("nouns"), words("adjectives"), words("links"), words("states")
_VERBS = [tuple(row.split("/")) for row in words("verbs")]  # base, third person, past, object
_TIMES = {
    "past": ["Yesterday", "Last week", "A year ago", "Last night"],
    "future": ["Tomorrow", "Next week", "Soon", "Next year"],
    "habit": ["Every day", "Every morning", "On most days", "Each week"],
}
_TOOLS = dict(row.split("/") for row in words("tools"))  # task: tool
_FORMS = {"she": ("her", "her"), "he": ("him", "his"), "they": ("them", "their")}


def any_item(rng: random.Random) -> Item:
    """A gap of any of the four sorts."""
    sentence, answer, wrong = rng.choice([_agreement, _tense, _pronoun, _tool])(rng)
    return Item("language", sentence, f"Complete the sentence: {sentence}", answer, wrong)


def is_reserved(item: Item) -> bool:
    """True if the sentence of `item` is kept for the test."""
    return reserved(item.key, RESERVED_PERCENT)


def training_item(rng: random.Random) -> Item:
    """A question that may appear in training text."""
    return draw(any_item, rng, lambda item: not is_reserved(item))


def exercise(rng: random.Random) -> str:
    """A document: gaps with their answers, or the same kind of sentences written out."""
    items = [training_item(rng) for _ in range(rng.randint(4, 12))]
    if rng.random() < 0.5:
        return " ".join(item.key.replace("___", item.answer) for item in items)
    return "\n\n".join(item.text for item in items)


def _agreement(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    """The noun in between has the other number, so the nearest noun misleads."""
    head, other = rng.sample(_NOUNS, 2)
    plural, past = rng.random() < 0.5, rng.random() < 0.4
    head, other = (f"{head}s", other) if plural else (head, f"{other}s")
    time = " yesterday" if past else ""
    sentence = f"The {rng.choice(_ADJECTIVES)} {head} {rng.choice(_LINKS)} the {other} ___ {rng.choice(_STATES)}{time}."
    forms = ["are", "is", "were", "was"]
    answer = forms[2 * past + (not plural)]
    return sentence, answer, tuple(form for form in forms if form != answer)


def _tense(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    base, third, past, thing = rng.choice(_VERBS)
    time = rng.choice(list(_TIMES))
    forms = {"past": past, "future": f"will {base}", "habit": third}
    sentence = f"{rng.choice(_TIMES[time])} the {rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)} ___ {thing}."
    answer = forms.pop(time)
    return sentence, answer, (*forms.values(), f"{base}ing" if not base.endswith("e") else f"{base[:-1]}ing")


def _pronoun(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    who = rng.choice(list(_FORMS))
    if who == "they":
        subject = " and ".join(rng.sample(GIRLS + BOYS, 2))
    else:
        subject = rng.choice(GIRLS if who == "she" else BOYS)
    objective, possessive = _FORMS[who]
    thing, place = rng.choice(words("belongings")), rng.choice(PLACES)
    if rng.random() < 0.5:
        sentence = f"{subject} went out {place} because ___ liked the {rng.choice(WEATHERS)} weather."
        answer, pool = who, ["she", "he", "they", "it", "us"]
    else:
        sentence = f"{subject} lost a {thing} {place}, so a friend helped ___ look for it."
        answer, pool = objective, ["her", "him", "them", "its", possessive]
    return sentence, answer, wrong_answers(rng, answer, pool)


def _tool(rng: random.Random) -> tuple[str, str, tuple[str, ...]]:
    task, tool = rng.choice(list(_TOOLS.items()))
    name = rng.choice(GIRLS + BOYS)
    if rng.random() < 0.5:
        sentence = f"To {task}, {name} took the {rng.choice(_ADJECTIVES[:4])} ___."
    else:
        sentence = f"{name} wanted to {task} {rng.choice(PLACES)} and needed the ___."
    return sentence, tool, wrong_answers(rng, tool, _TOOLS.values())
