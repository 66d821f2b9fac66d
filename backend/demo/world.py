"""Orrin, an invented land: its people, towns and creatures, and every way to state or ask a fact about them.

All facts are fixed by one seed. Each fact is stated in many paraphrases in the text. About half of the facts are
also asked as questions there; the others are `reserved` and are asked only in the multiple-choice test, so a
right answer there takes a fact that was read, not a question that was memorised.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from backend.demo.grammar import capitalised, expand, load_phrases, words
from backend.demo.splits import reserved

WORLD_SEED = 1871
RESERVED_PERCENT = 45

_ATTRIBUTES = {
    "person": ["town", "job", "pet", "food", "instrument", "month", "colour"],
    "town": ["region", "river", "product", "landmark", "year", "festival"],
    "creature": ["habitat", "diet", "colour", "size", "sound"],
}
_SHARED_LISTS = {
    "person.town": "towns",
    "person.month": "months",
    "person.colour": "colours",
    "town.festival": "months",
    "creature.colour": "colours",
}

VALUES: dict[str, list[str]] = {
    attribute: words(_SHARED_LISTS.get(attribute, attribute))
    for kind, names in _ATTRIBUTES.items()
    for attribute in (f"{kind}.{name}" for name in names)
}
"""All possible values of every attribute, such as ``"person.town"``."""


@dataclass(frozen=True)
class Entity:
    """A person, town or creature: what it is called, and its value for every attribute of its kind."""

    kind: str
    name: str
    full_name: str
    pronoun: str
    possessive: str
    values: dict[str, str]

    @property
    def facts(self) -> list[Fact]:
        """All facts about this entity, in the order of `VALUES`."""
        return [Fact(self, attribute) for attribute in self.values]


@dataclass(frozen=True)
class Fact:
    """One attribute (such as ``"person.town"``) of one entity."""

    entity: Entity
    attribute: str

    @property
    def value(self) -> str:
        """The true value."""
        return self.entity.values[self.attribute]

    @property
    def reserved(self) -> bool:
        """True if this fact is asked in the multiple-choice test and nowhere else."""
        return reserved(f"{self.entity.name}/{self.attribute}", RESERVED_PERCENT)

    def statement(self, rng: random.Random, *, pronoun: bool = False) -> str:
        """One declarative paraphrase; with `pronoun`, it may start with "She", "It", "Her", ..."""
        return self._expand(rng, 0, pronoun=pronoun)

    def question(self, rng: random.Random) -> str:
        """One way to ask for the value."""
        return self._expand(rng, 1)

    def answer(self, rng: random.Random) -> str:
        """The value in a whole sentence."""
        return self._expand(rng, 2, pronoun=rng.random() < 0.3)

    def _expand(self, rng: random.Random, group: int, *, pronoun: bool = False) -> str:
        entity = self.entity
        name = entity.full_name if rng.random() < 0.4 else entity.name
        subject, possessive = capitalised(name), f"{capitalised(name)}'s"
        if pronoun:
            subject, possessive = entity.pronoun, entity.possessive
        template = rng.choice(load_phrases("world")[self.attribute][group])
        return expand(rng, template, n=name, v=self.value, S=subject, P=possessive)


def combined_statement(rng: random.Random, entity: Entity) -> str:
    """A sentence that states two or three facts of `entity` at once."""
    template = rng.choice(load_phrases("world")[f"{entity.kind}.combo"][0])
    slots = {attribute.partition(".")[2]: value for attribute, value in entity.values.items()}
    return expand(rng, template, n=entity.name, **slots)


@cache
def entities() -> tuple[Entity, ...]:
    """Everything that lives or stands in Orrin: 64 people, 24 towns, 24 creatures."""
    rng = random.Random(WORLD_SEED)
    families, towns, creatures = words("families"), words("towns"), words("creatures")
    people = [(name, "She", "Her") for name in words("women")] + [(name, "He", "His") for name in words("men")]
    found = [
        Entity("person", name, f"{name} {rng.choice(families)}", pronoun, possessive, values)
        for (name, pronoun, possessive), values in zip(people, _deal(rng, "person", len(people)), strict=True)
    ]
    for name, values in zip(towns, _deal(rng, "town", len(towns)), strict=True):
        found.append(Entity("town", name, f"the town of {name}", "It", "Its", values))
    for name, values in zip(creatures, _deal(rng, "creature", len(creatures)), strict=True):
        found.append(Entity("creature", f"the {name}", f"the {name}", "It", "Its", values))
    return tuple(found)


@cache
def all_facts() -> tuple[Fact, ...]:
    """Every fact of the world."""
    return tuple(fact for entity in entities() for fact in entity.facts)


@cache
def asked_facts() -> tuple[Fact, ...]:
    """The facts which texts may ask about (those not reserved for the test)."""
    return tuple(fact for fact in all_facts() if not fact.reserved)


def _deal(rng: random.Random, kind: str, count: int) -> list[dict[str, str]]:
    """Values for `count` entities; within an attribute every value is used about equally often."""
    rows: list[dict[str, str]] = [{} for _ in range(count)]
    for attribute, values in VALUES.items():
        if attribute.startswith(f"{kind}."):
            pile = (values * (count // len(values) + 1))[:count]
            rng.shuffle(pile)
            for row, value in zip(rows, pile, strict=True):
                row[attribute] = value
    return rows
