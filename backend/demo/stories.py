"""Short stories: a plot is a list of steps, each step one of several sentences."""

from __future__ import annotations

import random
from dataclasses import dataclass

from backend.demo.grammar import expand, load_phrases, words

GIRLS = words("girls")
BOYS = words("boys")
ANIMALS = words("animals")
THINGS = words("things")
PLACES = words("places")
FOODS = words("foods")
WEATHERS = words("weathers")
_NATURES = words("natures")


@dataclass(frozen=True)
class Character:
    """Someone in a story: a child with a name, or an animal."""

    mention: str
    intro: str
    pronouns: tuple[str, str, str]


def child(rng: random.Random) -> Character:
    """A random girl or boy."""
    if rng.random() < 0.5:
        name, noun, pronouns = rng.choice(GIRLS), "girl", ("she", "her", "her")
    else:
        name, noun, pronouns = rng.choice(BOYS), "boy", ("he", "him", "his")
    return Character(name, f"a {rng.choice(_NATURES)} {noun} named {name}", pronouns)


def animal(rng: random.Random, kind: str | None = None) -> Character:
    """An animal of the given or of a random kind."""
    kind = kind or rng.choice(ANIMALS)
    pronouns = rng.choice([("he", "him", "his"), ("she", "her", "her")])
    return Character(f"the {kind}", f"a {rng.choice(_NATURES)} {kind}", pronouns)


def spot(place: str) -> str:
    """The place itself: ``"the attic"`` for ``"in the attic"``."""
    return place.partition(" ")[2]


def tell(rng: random.Random, hero: Character | None = None) -> str:
    """One story of about 60 to 200 words, about `hero` or about anyone."""
    cast = [hero or (child if rng.random() < 0.5 else animal)(rng)]
    while len(cast) < 3:
        guest = (child if rng.random() < 0.4 else animal)(rng)
        if guest.mention not in {member.mention for member in cast}:
            cast.append(guest)
    first, friend, other = cast
    thing = rng.choice(THINGS)
    places = rng.sample(PLACES, 3)
    slots = {
        "hero": first.mention, "intro": first.intro, "friend": friend.mention, "other": other.mention,
        "he": first.pronouns[0], "him": first.pronouns[1], "his": first.pronouns[2],
        "him2": friend.pronouns[1], "his2": friend.pronouns[2], "his3": other.pronouns[2],
        "thing": f"a {thing}", "bare": thing, "food": rng.choice(FOODS), "weather": rng.choice(WEATHERS),
        "place": places[0], "place2": places[1], "place3": places[2],
        "spot": spot(places[0]), "spot2": spot(places[1]), "spot3": spot(places[2]),
    }  # fmt: skip
    steps = rng.choice(list(load_phrases("stories").values()))
    sentences = []
    for step in steps:
        lines = rng.sample(step, 2) if rng.random() < 0.15 and len(step) > 2 else [rng.choice(step)]
        sentences += [expand(rng, line, **slots) for line in lines]
    return " ".join(sentence[0].upper() + sentence[1:] for sentence in sentences)
