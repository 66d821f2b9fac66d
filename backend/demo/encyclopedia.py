"""Documents about the invented land: articles, lists, travel letters, quizzes. Only asked facts are ever asked."""

from __future__ import annotations

import random

from backend.demo.grammar import capitalised, expand
from backend.demo.world import VALUES, Entity, Fact, all_facts, asked_facts, combined_statement, entities

_LABELS = {
    "town": "Home", "job": "Work", "pet": "Pet", "food": "Favourite food", "instrument": "Instrument",
    "month": "Birthday", "colour": "Colour", "region": "Region", "river": "River", "product": "Known for",
    "landmark": "Sight", "year": "Founded", "festival": "Fair", "habitat": "Habitat", "diet": "Food",
    "size": "Size", "sound": "Call",
}  # fmt: skip
_OPENINGS = [
    "[This page tells|Here are some things to know|A short note] about {n}.",
    "[From the almanac of Orrin|From the great book of Orrin], on {n}.",
    "What [do we know|is known] about {n}?",
    "Travellers in Orrin often ask about {n}.",
]
_ARRIVALS = [
    "[Dear|My dear] {who}, [last week|last month|yesterday|in spring] I [came to|visited|stayed in] {town}.",
    "{who} [asked|wanted] me to write about {town}, so here is what I saw.",
    "Today our journey through Orrin [took us|led us] to {town}.",
]
_MEETINGS = [
    "There I met {n}.",
    "[At the inn|In the street|On the market] {n} [greeted me|sat beside me|told me many things].",
    "I [also|soon] met {n}, [who was very kind|and we talked for an hour].",
]
_FAREWELLS = [
    "[Tomorrow|Soon] I travel on. [Yours|Your friend], {who}",
    "I will write again [soon|from the next town].",
    "It was hard to leave.",
]


def article(rng: random.Random) -> str:
    """Prose about one to three entities, each with most of its facts in random order and wording."""
    return "\n\n".join(about(rng, entity) for entity in rng.sample(entities(), rng.choice([1, 2, 2, 3])))


def about(rng: random.Random, entity: Entity) -> str:
    """One paragraph about `entity`."""
    sentences = []
    if rng.random() < 0.3:
        sentences.append(expand(rng, rng.choice(_OPENINGS), n=entity.full_name))
    if rng.random() < 0.5:
        sentences.append(combined_statement(rng, entity))
    facts = rng.sample(entity.facts, rng.randint(3, len(entity.facts)))
    for i, fact in enumerate(facts):
        sentences.append(fact.statement(rng, pronoun=(i > 0 or bool(sentences)) and rng.random() < 0.45))
    return " ".join(map(capitalised, sentences))


def fact_list(rng: random.Random) -> str:
    """Short records, one line per fact."""
    records = []
    for entity in rng.sample(entities(), rng.randint(2, 6)):
        facts = rng.sample(entity.facts, rng.randint(2, len(entity.facts)))
        lines = [f"{_LABELS[fact.attribute.partition('.')[2]]}: {fact.value}" for fact in facts]
        records.append("\n".join([capitalised(entity.full_name), *lines]))
    return "\n\n".join(records)


def letter(rng: random.Random) -> str:
    """A visit to a town and to people who live there, told in the first person."""
    towns = [entity for entity in entities() if entity.kind == "town"]
    town = rng.choice(towns)
    citizens = [entity for entity in entities() if entity.values.get("person.town") == town.name]
    who = rng.choice([entity for entity in entities() if entity.kind == "person"]).name
    sentences = [expand(rng, rng.choice(_ARRIVALS), who=who, town=town.name)]
    sentences += [fact.statement(rng) for fact in rng.sample(town.facts, rng.randint(2, 5))]
    for person in rng.sample(citizens, min(len(citizens), rng.randint(1, 3))):
        sentences.append(expand(rng, rng.choice(_MEETINGS), n=person.full_name))
        facts = rng.sample(person.facts, rng.randint(2, 4))
        sentences += [fact.statement(rng, pronoun=rng.random() < 0.6) for fact in facts]
    sentences.append(expand(rng, rng.choice(_FAREWELLS), who=who))
    return " ".join(map(capitalised, sentences))


def theme(rng: random.Random) -> str:
    """One attribute across many entities: who plays what, which town lies where."""
    attribute = rng.choice(list(VALUES))
    facts = [fact for fact in all_facts() if fact.attribute == attribute]
    return " ".join(capitalised(fact.statement(rng)) for fact in rng.sample(facts, rng.randint(5, 14)))


def quiz(rng: random.Random) -> str:
    """Questions and short answers."""
    facts = rng.sample(asked_facts(), rng.randint(4, 14))
    return "\n\n".join(f"Question: {fact.question(rng)}\nAnswer: {fact.value}" for fact in facts)


def explained_quiz(rng: random.Random) -> str:
    """A paragraph about an entity, followed by questions on it (and none on its reserved facts)."""
    entity = rng.choice(entities())
    asked = [fact for fact in entity.facts if not fact.reserved]
    questions = [f"Question: {fact.question(rng)}\nAnswer: {fact.value}" for fact in asked]
    rng.shuffle(questions)
    return "\n\n".join([about(rng, entity), *questions])


def questioned(rng: random.Random) -> Fact:
    """A fact that text may ask about."""
    return rng.choice(asked_facts())


def document(rng: random.Random) -> str:
    """Any of the documents above."""
    make = rng.choices([article, fact_list, letter, theme, quiz, explained_quiz], weights=[8, 2, 4, 3, 7, 3])[0]
    return make(rng)
