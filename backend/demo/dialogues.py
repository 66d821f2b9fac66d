"""Dialogues in the chat template's own format: small talk, sums, facts, stories, reading."""

from __future__ import annotations

import random
from collections.abc import Sequence

from backend.demo import arithmetic, encyclopedia, language, reading, stories
from backend.demo.grammar import capitalised, expand, load_phrases
from backend.demo.items import Item
from backend.demo.world import entities

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (BOS, EOS, PAD, *(f"<|{role}|>" for role in ROLES))

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|{{ message['role'] }}|>\n{{ message['content'] | trim }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)

Turn = tuple[str, str]
_SMALL_TALK = ["who", "maker", "able", "limits", "hello", "mood", "thanks", "bye", "outside", "orrin"]


def render(turns: Sequence[Turn]) -> str:
    """Turns of (role, content) exactly as `CHAT_TEMPLATE` writes them, without the BOS token."""
    return "\n".join(f"<|{role}|>\n{content.strip()}{EOS}" for role, content in turns)


def dialogue(rng: random.Random) -> str:
    """A document: one to five exchanges between a user and the assistant."""
    turns: list[Turn] = []
    if rng.random() < 0.1:
        turns.append(("system", rng.choice(load_phrases("dialogues")["system"][0])))
    makers = [_fact, _sum, _small_talk, _story, _about, _reading, _language]
    for make in rng.choices(makers, weights=[28, 24, 22, 12, 8, 4, 2], k=rng.choice([1, 1, 2, 3, 3, 4, 5])):
        asked, answered = make(rng)
        turns += [("user", asked), ("assistant", answered)]
    return render(turns)


def _say(rng: random.Random, section: str, group: int = 0, **slots: str) -> str:
    return expand(rng, rng.choice(load_phrases("dialogues")[section][group]), **slots)


def _ask(rng: random.Random, question: str) -> str:
    style = rng.random()
    if style < 0.8:
        return question
    return _say(rng, "more" if style < 0.9 else "polite", q=question)


def _small_talk(rng: random.Random) -> tuple[str, str]:
    section = rng.choice(_SMALL_TALK)
    return _say(rng, section), _say(rng, section, 1)


def _fact(rng: random.Random) -> tuple[str, str]:
    fact = encyclopedia.questioned(rng)
    answer = fact.answer(rng) if rng.random() < 0.85 else f"{capitalised(fact.value)}."
    return _ask(rng, fact.question(rng)), answer


def _sum(rng: random.Random) -> tuple[str, str]:
    item = arithmetic.training_item(rng)
    question = item.prompt.removeprefix("Question: ")
    if question.startswith("What is ") and rng.random() < 0.7:
        return _ask(rng, question), f"{question.removeprefix('What is ').removesuffix('?')} = {item.answer}"
    return _ask(rng, question), rng.choice(["{a}", "{a}.", "The answer is {a}."]).format(a=item.answer)


def _story(rng: random.Random) -> tuple[str, str]:
    style = rng.random()
    if style < 0.2:
        return _say(rng, "story"), stories.tell(rng)
    if style < 0.8:
        kind = rng.choice(stories.ANIMALS)
        return _say(rng, "animal story", kind=kind), stories.tell(rng, stories.animal(rng, kind))
    hero = stories.child(rng)
    return _say(rng, "child story", kind=hero.mention), stories.tell(rng, hero)


def _about(rng: random.Random) -> tuple[str, str]:
    entity = rng.choice(entities())
    return _say(rng, "about", n=entity.name), encyclopedia.about(rng, entity)


def _reading(rng: random.Random) -> tuple[str, str]:
    return _exercise(reading.training_item(rng))


def _language(rng: random.Random) -> tuple[str, str]:
    return _exercise(language.training_item(rng))


def _exercise(item: Item) -> tuple[str, str]:
    return item.prompt.replace("Question: ", ""), capitalised(item.answer)
