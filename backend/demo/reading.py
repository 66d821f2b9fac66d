"""Reading comprehension: little passages about four children, and questions only the passage can answer."""

from __future__ import annotations

import random
from dataclasses import dataclass

from backend.demo.grammar import expand, listed, words
from backend.demo.items import Item, draw, wrong_answers
from backend.demo.splits import reserved
from backend.demo.stories import BOYS, FOODS, GIRLS, PLACES, THINGS, WEATHERS
from backend.demo.world import VALUES

RESERVED_PERCENT = 10
_CLOTHES = words("clothes")
_OPENINGS = [
    "It was a {w} [morning|day|afternoon|evening], and {names} [met|came together|were out] {p}.",
    "{names} [are friends|live in the same street|go to the same school].",
    "[One|On a] {w} day {names} [met|played] {p}.",
    "{names} spent the {w} day together.",
]
_FILLERS = [
    "The [wind|rain|sun] [grew stronger|came and went].",
    "Nobody [was in a hurry|said a word|wanted to go home].",
    "A bird [sang|called] from [a tree|the roof].",
    "Then they [told stories|rested|laughed a lot].",
]
# For each theme: how to state (name, value), and how to ask for the value or for the name.
_THEMES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "place": (
        ["{n} [hid|put|left|placed] the {o} {v}.", "{n} took the {o} and [hid|put|left] it {v}.",
         "The {o} [of {n} is|that {n} owns is|belonging to {n} is] {v}."],
        ["Where is the {o}?", "Where is the {o} of {n}?", "Where can {n} find the {o}?"],
        [],
    ),
    "thing": (
        ["{n} [found|brought|carried|bought] a {v}.", "A {v} [belongs to|was given to] {n}.", "{n} had a {v}."],
        ["What did {n} have?", "What belongs to {n}?", "What was with {n}?"],
        ["Who had the {v}?", "Who is the owner of the {v}?", "Whose is the {v}?"],
    ),
    "food": (
        ["{n} [ate|had|chose] {v}.", "{n} [asked for|wanted] {v}.", "There was {v} for {n}."],
        ["What did {n} eat?", "What did {n} choose?", "What was there for {n}?"],
        ["Who ate the {v}?", "Who chose the {v}?"],
    ),
    "colour": (
        ["{n} wore a {v} {o}.", "The {o} of {n} was {v}.", "{n} came in a {v} {o}."],
        ["What colour was the {o} of {n}?", "Which colour did {n} wear?"],
        ["Who wore a {v} {o}?", "Whose {o} was {v}?"],
    ),
    "number": (
        ["{n} [counted|found|saw] {v} {o}.", "{n} had {v} {o}.", "There were {v} {o} in the basket of {n}."],
        ["How many {o} did {n} have?", "How many {o} were there for {n}?"],
        ["Who had {v} {o}?"],
    ),
}  # fmt: skip
_COUNTED = words("counted")


@dataclass(frozen=True)
class Passage:
    """A passage about four children, each with one value of a theme (and, for some themes, an object)."""

    text: str
    theme: str
    names: list[str]
    values: list[str]
    objects: list[str]

    @property
    def reserved(self) -> bool:
        """True if the passage is kept for the test."""
        return reserved(self.text, RESERVED_PERCENT)

    def ask(self, rng: random.Random) -> Item:
        """One question about the passage; the wrong answers come from the passage as well."""
        _, for_value, for_name = _THEMES[self.theme]
        i = rng.randrange(len(self.names))
        by_value = not for_name or rng.random() < 0.6
        template = rng.choice(for_value if by_value else for_name)
        question = expand(rng, template, n=self.names[i], v=self.values[i], o=self.objects[i])
        pool = self.values if by_value else self.names
        prompt = f"{self.text}\nQuestion: {question}"
        return Item("reading", self.text, prompt, pool[i], wrong_answers(rng, pool[i], pool))


def passage(rng: random.Random) -> Passage:
    """A passage with a random theme, cast and order of sentences."""
    theme = rng.choice(list(_THEMES))
    names = rng.sample(GIRLS + BOYS, 4)
    values, objects = _values(rng, theme)
    statements = [
        expand(rng, rng.choice(_THEMES[theme][0]), n=n, v=v, o=o)
        for n, v, o in zip(names, values, objects, strict=True)
    ]
    rng.shuffle(statements)
    if rng.random() < 0.5:
        statements.insert(rng.randint(1, 3), expand(rng, rng.choice(_FILLERS)))
    opening = expand(
        rng, rng.choice(_OPENINGS), w=rng.choice(WEATHERS), p=rng.choice(PLACES), names=listed(rng.sample(names, 4))
    )
    return Passage(" ".join([opening, *statements]), theme, names, values, objects)


def any_item(rng: random.Random) -> Item:
    """One question about a new passage."""
    return passage(rng).ask(rng)


def is_reserved(item: Item) -> bool:
    """True if the passage of `item` is kept for the test."""
    return reserved(item.key, RESERVED_PERCENT)


def exercise(rng: random.Random) -> str:
    """A document: one or two passages with several questions each, none of them reserved."""
    blocks = []
    for _ in range(rng.randint(1, 3)):
        found = passage(rng)
        while found.reserved:
            found = passage(rng)
        asked = {item.prompt: item for item in (found.ask(rng) for _ in range(rng.randint(1, 5)))}
        answers = [item.text.removeprefix(found.text + "\n") for item in asked.values()]
        blocks.append("\n".join([found.text, *answers]))
    return "\n\n".join(blocks)


def drill(rng: random.Random) -> str:
    """A document: one passage and many questions about it, so that most of the text is answers to be looked up."""
    found = passage(rng)
    while found.reserved:
        found = passage(rng)
    asked = {item.prompt: item for item in (found.ask(rng) for _ in range(14))}
    return "\n".join([found.text, *(item.text.removeprefix(found.text + "\n") for item in asked.values())])


def training_item(rng: random.Random) -> Item:
    """A question that may appear in training text."""
    return draw(any_item, rng, lambda item: not is_reserved(item))


def _values(rng: random.Random, theme: str) -> tuple[list[str], list[str]]:
    """Four different values, and the object each goes with."""
    if theme == "place":
        return rng.sample(PLACES, 4), rng.sample(THINGS, 4)
    if theme == "thing":
        return rng.sample(THINGS, 4), [""] * 4
    if theme == "food":
        return rng.sample(FOODS, 4), [""] * 4
    if theme == "colour":
        return rng.sample(VALUES["person.colour"], 4), [rng.choice(_CLOTHES)] * 4
    return [str(n) for n in rng.sample(range(2, 60), 4)], [rng.choice(_COUNTED)] * 4
